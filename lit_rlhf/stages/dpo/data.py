"""Rankings for DPO."""

from __future__ import annotations

from lit_rlhf.stages.rankings import RankingDataModule, WorldRankingDataModule


class DPODataModule(RankingDataModule):
    """Rankings or pairs from a file; arguments as in :class:`RankingDataModule`."""


class WorldDPODataModule(WorldRankingDataModule, DPODataModule):
    """Rankings of the built-in world's prompts."""
