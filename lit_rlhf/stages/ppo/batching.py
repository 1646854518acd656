"""How sequences are laid out for a pass through a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lit_rlhf.text.packing import Packed, pack, runs


@dataclass(frozen=True)
class Batching:
    """Lays N sequences of a rollout into passes that memory holds."""

    pad_id: int
    device: torch.device
    packing: bool  # without padding; False: each sequence padded to the longest
    share_prompts: bool  # a prompt once for all its responses
    size: int | None  # sequences in a pass; None: as many as ``tokens`` hold

    def packed(self, sequences: Sequence[list[int]], response_masks: Sequence[list[bool]]) -> Packed:
        """All of them in one batch; a mask has one bool per token, True = written by the policy."""
        settings = {"share_prompts": self.share_prompts, "padded": not self.packing}
        return pack(sequences, self.pad_id, response_masks=response_masks, **settings).to(self.device)

    def batches(
        self, sequences: Sequence[list[int]], response_masks: Sequence[list[bool]], tokens: int
    ) -> list[Packed]:
        """The same in as many batches as it takes."""
        return [self.packed(sequences[run], response_masks[run]) for run in self.runs(sequences, tokens)]

    def runs(self, sequences: Sequence[list[int]], tokens: int) -> list[slice]:
        """Which sequences go together, at most ``tokens`` in all."""
        if self.size is not None:
            return [slice(i, i + self.size) for i in range(0, len(sequences), self.size)]
        return runs([len(sequence) for sequence in sequences], tokens)
