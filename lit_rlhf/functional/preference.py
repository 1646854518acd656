"""Learning from comparisons: Bradley-Terry over all pairs of a ranking."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Pairs(NamedTuple):
    """Which answers of a batch are compared."""

    better: Tensor  # (M,) int64, index of the preferred answer
    worse: Tensor  # (M,) int64, index of the other one
    weight: Tensor  # (M,) float, 1 / (number of untied pairs of this prompt)
    prompts: int  # prompts that have at least one untied pair


def ranking_pairs(ranks: Tensor, prompt_index: Tensor) -> Pairs:
    """All C(K, 2) pairs inside each prompt, without the tied ones.

    ``ranks`` (N,) 1 = best; ``prompt_index`` (N,) says which prompt an answer belongs to. Pairs of one prompt
    share the weight 1, so that a prompt counts once however many answers it has (InstructGPT, section 3.5)."""
    same_prompt = prompt_index[:, None] == prompt_index[None, :]
    better, worse = torch.nonzero(same_prompt & (ranks[:, None] < ranks[None, :]), as_tuple=True)
    owner = prompt_index[better]
    _, inverse, counts = torch.unique(owner, return_inverse=True, return_counts=True)
    return Pairs(better, worse, 1.0 / counts[inverse].float(), int(counts.numel()))


def ranking_loss(scores: Tensor, pairs: Pairs) -> Tensor:
    """Bradley-Terry loss ``-1/C(K,2) E[log sigmoid(r_w - r_l)]`` (InstructGPT, eq. 1); a scalar.

    ``scores`` (N,), one an answer. The mean over each prompt's untied pairs, then over prompts; 0 if all are tied."""
    margins = scores[pairs.better] - scores[pairs.worse]
    return -(F.logsigmoid(margins) * pairs.weight).sum() / max(pairs.prompts, 1)


def pair_accuracy(scores: Tensor, pairs: Pairs) -> Tensor:
    """Fraction of untied pairs that ``scores`` (N,) order rightly; equal scores count half. NaN without a pair."""
    margins = scores[pairs.better] - scores[pairs.worse]
    return ((margins > 0).float() + 0.5 * (margins == 0).float()).mean()
