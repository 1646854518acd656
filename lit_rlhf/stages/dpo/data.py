"""Rankings for DPO."""

from __future__ import annotations

from typing import Any

from lit_rlhf.stages.prompts import sample_prompts, spread
from lit_rlhf.stages.rankings import RankingDataModule, WorldRankingDataModule


class DPODataModule(RankingDataModule):
    """Rankings or pairs from a file; arguments as in :class:`RankingDataModule`."""

    def for_module(self) -> dict[str, Any]:
        asked = [(ranking.prompt, ranking.tools) for ranking in spread(self.val_records, 4)]
        prompts = sample_prompts(asked, self.tokenizer, self.special_tokens, self.note)
        return {**super().for_module(), "sample_prompts": prompts, "note": self.note}


class WorldDPODataModule(WorldRankingDataModule, DPODataModule):
    """Rankings of the built-in world's prompts."""
