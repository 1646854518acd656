"""How sequences are laid out for a pass through a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lit_rlhf.text.packing import Packed, divided, pack, runs


@dataclass(frozen=True)
class Batching:
    """Lays N sequences, prompts with responses, into passes that memory holds."""

    pad_id: int
    device: torch.device
    packing: bool = True  # without padding; False: each sequence padded to the longest
    share_prompts: bool = False  # a prompt once for all its responses
    size: int | None = None  # sequences in a pass; None: as many as ``tokens`` hold
    passes: Callable[[int], int] = int  # how many passes there are to be, from how many it takes

    def packed(self, sequences: Sequence[list[int]], response_masks: Sequence[list[bool]]) -> Packed:
        """All of them in one batch; a mask has one bool per token, True = written by the policy."""
        share, padded = self.share_prompts, not self.packing
        packed = pack(sequences, self.pad_id, response_masks=response_masks, share_prompts=share, padded=padded)
        return packed.to(self.device)

    def batches(
        self, sequences: Sequence[list[int]], response_masks: Sequence[list[bool]], tokens: int
    ) -> list[Packed]:
        """The same in as many batches as it takes, in the order of the sequences."""
        runs = self.runs(sequences, response_masks, tokens)
        return [self.packed(sequences[run], response_masks[run]) for run in runs]

    def runs(self, sequences: Sequence[list[int]], response_masks: Sequence[list[bool]], tokens: int) -> list[slice]:
        """Which sequences go together, at most ``tokens`` in all, a shared prompt counted once."""
        found = [range(*run.indices(len(sequences))) for run in self._runs(sequences, response_masks, tokens)]
        return [slice(run.start, run.stop) for run in divided(found, self.passes(len(found)))]

    def _runs(self, sequences: Sequence[list[int]], response_masks: Sequence[list[bool]], tokens: int) -> list[slice]:
        if self.size is not None:
            return [slice(i, i + self.size) for i in range(0, len(sequences), self.size)]
        lengths = [len(sequence) for sequence in sequences]
        if not self.share_prompts:
            return runs(lengths, tokens)
        prompts = _prompts(sequences, response_masks)
        shared = [len(this) if this == last else 0 for last, this in zip([None, *prompts], prompts)]
        return runs(lengths, tokens, shared=shared)

    def by_prompt(self, sequences: Sequence[list[int]], response_masks: Sequence[list[bool]]) -> list[int]:
        """An order in which the sequences of one prompt stand together, where that lets them share it."""
        order = list(range(len(sequences)))
        if not self.share_prompts:
            return order
        prompts = _prompts(sequences, response_masks)
        first = {tuple(prompt): i for i, prompt in reversed([*enumerate(prompts)])}
        return sorted(order, key=lambda i: first[tuple(prompts[i])])


def _prompts(sequences: Sequence[list[int]], response_masks: Sequence[list[bool]]) -> list[list[int]]:
    """What stands before the first response of each sequence."""
    return [sequence[: mask.index(True)] for sequence, mask in zip(sequences, response_masks)]
