"""The units of scores: their scale over sampled answers, and what is taken off them."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from lit_rlhf.functional.masking import check_shapes

Said = TypeVar("Said", float, Tensor)


class ScoreScale(NamedTuple):
    """Scale of a scorer, measured on demonstrations and on sampled answers.

    Called with what it says, a number or a tensor of any shape, it gives the scores: ``said + shift``, with ``center``
    less their mean, with ``divide`` divided by their standard deviation.

    >>> ScoreScale(shift=1.0, mean=0.5, std=2.0)(3.5, divide=True, center=True)
    2.0
    """

    shift: float = 0.0  # demonstrations average 0 with it (InstructGPT, section 3.5)
    mean: float = 0.0  # of the shifted scores of sampled answers
    std: float = 1.0  # of these scores

    def __call__(self, said: Said, *, divide: bool = False, center: bool = False) -> Said:
        scores = said + self.shift
        scores = scores - self.mean if center else scores
        return scores / self.std if divide else scores


def shaped_scores(
    scores: Tensor,
    lengths: Tensor,
    finished: Tensor,
    clip: float | None = None,
    missing_eos_penalty: float = 0.0,
    length_penalty: float = 0.0,
) -> Tensor:
    """``clip(score) - missing_eos_penalty [cut off] - length_penalty * length`` (N,); NaN stays NaN.

    ``lengths`` (N,) in tokens; ``finished`` (N,) bool, False = cut off without an end token; ``clip``: largest absolute
    score; penalties in the units of the scores.

    >>> shaped_scores(torch.tensor([3.0, -1.0]), torch.tensor([10, 20]), torch.tensor([True, False]), 2.0, 1.0, 0.1)
    tensor([ 1., -4.])
    """
    check_shapes(scores=scores, lengths=lengths, finished=finished)
    clipped = scores if clip is None else torch.clamp(scores, -clip, clip)
    return clipped - missing_eos_penalty * (~finished).float() - length_penalty * lengths
