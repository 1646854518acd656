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


def dpo_loss(logprobs: Tensor, ref_logprobs: Tensor, pairs: Pairs, beta: float) -> Tensor:
    """``-E[log sigmoid(beta (log pi/ref (y_w) - log pi/ref (y_l)))]`` (arXiv:2305.18290, eq. 7); a scalar.

    ``logprobs`` and ``ref_logprobs`` (N,) are those of whole answers, in nats; ``beta`` in reward units a nat. It is
    :func:`ranking_loss` of the rewards that the policy implies, :func:`implicit_rewards`."""
    return ranking_loss(implicit_rewards(logprobs, ref_logprobs, beta), pairs)


def implicit_rewards(logprobs: Tensor, ref_logprobs: Tensor, beta: float) -> Tensor:
    """``beta log pi(y|x)/ref(y|x)`` (N,), the reward for which ``pi`` is optimal, up to a constant of the prompt."""
    return beta * (logprobs - ref_logprobs)
