"""Who wins: win rates and their intervals."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class WinRate(NamedTuple):
    """A win rate with its 95% interval."""

    mean: float  # 0..1, a tie counts half
    low: float
    high: float
    n: int  # comparisons
    prompts: int


def pairwise_wins(ours: Tensor, theirs: Tensor) -> Tensor:
    """Win rate (P,) a prompt: each of our A answers against each of their B, a tie half.

    ``ours`` (P, A) and ``theirs`` (P, B) are grades, higher is better."""
    difference = ours[:, :, None] - theirs[:, None, :]
    return ((difference > 0).double() + 0.5 * (difference == 0).double()).mean((1, 2))


def win_rate(ours: Tensor, theirs: Tensor, resamples: int = 2000, seed: int = 0) -> WinRate:
    """Mean win rate with a percentile bootstrap that resamples prompts (Efron 1979).

    ``ours`` (P, A), ``theirs`` (P, B) as in :func:`pairwise_wins`. Answers to one prompt are not independent, so the
    prompts are resampled, not the answers. ``n`` counts our answers, ``prompts`` the rows."""
    wins = pairwise_wins(ours, theirs)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(wins), (resamples, len(wins)), generator=generator)
    means = wins[draws].mean(-1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return WinRate(wins.mean().item(), low, high, ours.numel(), len(wins))


def best_of_n(grades: Tensor, scores: Tensor) -> Tensor:
    """Grade (P,) of the answer with the highest score of each prompt; ``grades`` and ``scores`` are (P, n)."""
    return grades.gather(1, scores.argmax(1, keepdim=True)).squeeze(1)


def best_of_n_kl(n: int) -> float:
    """``log n - (n - 1) / n`` nats an answer: how far best-of-n is from the model it draws from (arXiv:2009.01325).

    Exact where all answers differ; where they repeat, an upper bound (arXiv:2401.01879)."""
    return math.log(n) - (n - 1) / n


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """95% interval of a share of ``successes`` among ``n`` independent trials (Wilson 1927); (0, 1) of none."""
    if n == 0:
        return 0.0, 1.0
    z, share = 1.959964, successes / n  # the normal distribution's 97.5% quantile
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)
