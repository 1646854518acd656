"""Uncertainty of figures: 95% intervals of shares, of means and of ratios over prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

Z95 = 1.959963984540054  # standard errors on either side of a normal mean that hold 95%
FEW = 10  # prompts: what differs between fewer says too little of what differs between all


class Estimate(NamedTuple):
    """A figure with its 95% interval."""

    value: float
    low: float
    high: float
    n: int  # prompts, rows or whatever was resampled


def window_error(values: Sequence[float], window: int) -> float:
    """Standard error of the difference of two means over ``window`` values each, for a series that drifts slowly.

    The noise of one value is told by neighbours, whose difference a slow trend hardly changes (von Neumann, 1941):
    ``sqrt(mean((x_t+1 - x_t)^2) / window)``, as that mean is twice the variance of a value.

    >>> window_error([0.0, 2.0, 0.0, 2.0], window=4)
    1.0
    """
    squares = [(after - before) ** 2 for before, after in pairwise(values)]
    return math.sqrt(sum(squares) / len(squares) / window)


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """95% interval of a share ``successes / n`` of independent trials (Wilson 1927), within 0..1; (0, 1) of none.

    It has a width where all trials or none succeed, which a bootstrap has not.

    >>> low, high = wilson_interval(7, 10)
    >>> f"{low:.3f} to {high:.3f}"
    '0.397 to 0.892'
    """
    if n == 0:
        return 0.0, 1.0
    share, shrink = successes / n, 1 + Z95**2 / n
    middle = (share + Z95**2 / (2 * n)) / shrink
    half = Z95 / shrink * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2))
    return max(0.0, middle - half), min(1.0, middle + half)


def resampled(n: int, resamples: int, seed: int) -> Tensor:
    """(resamples, n) float64: how often each of n prompts is drawn when n are drawn with replacement (Efron 1979).

    >>> resampled(4, resamples=2, seed=0).sum(1)
    tensor([4., 4.], dtype=torch.float64)
    """
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(n, (resamples, n), generator=generator)
    ones = torch.ones((), dtype=torch.float64).expand_as(draws)
    return torch.zeros(resamples, n, dtype=torch.float64).scatter_add_(1, draws, ones)


def middle_95(values: Tensor) -> tuple[Tensor, Tensor]:
    """(low, high): the 2.5% and 97.5% quantiles of ``values`` (R, ...) over their first dimension.

    >>> low, high = middle_95(torch.arange(1001.0))
    >>> round(low.item(), 2), round(high.item(), 2)
    (25.0, 975.0)
    """
    low, high = torch.quantile(values, torch.tensor([0.025, 0.975], dtype=values.dtype), dim=0)
    return low, high


def ratio(numerators: Tensor, denominators: Tensor, resamples: int = 2000, seed: int = 0) -> Estimate:
    """``sum(numerators) / sum(denominators)`` with a percentile bootstrap over prompts; both are (P,).

    With denominators of 1 it is a mean; with nats and tokens, nats per token, where long answers count for more.

    >>> ratio(torch.tensor([1.0, 9.0]), torch.tensor([1.0, 3.0]))  # 10 nats of 4 tokens
    Estimate(value=2.5, low=1.0, high=3.0, n=2)
    """
    top, bottom = numerators.double(), denominators.double()
    counts = resampled(len(top), resamples, seed)
    low, high = middle_95((counts @ top) / (counts @ bottom))
    return Estimate((top.sum() / bottom.sum()).item(), low.item(), high.item(), len(top))


def ratio_difference(
    ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], resamples: int = 2000, seed: int = 0
) -> Estimate:
    """:func:`ratio` of ours less that of theirs, each (numerators (P,), denominators (P,)) over the same prompts.

    Both are resampled together: what is hard about a prompt is hard for both, and drops out of the difference.

    >>> tokens = torch.tensor([10.0, 20.0])
    >>> ratio_difference((torch.tensor([30.0, 60.0]), tokens), (torch.tensor([20.0, 40.0]), tokens))
    Estimate(value=1.0, low=1.0, high=1.0, n=2)
    """
    counts = resampled(len(ours[0]), resamples, seed)
    (top, bottom), (their_top, their_bottom) = ([side.double() for side in pair] for pair in (ours, theirs))
    low, high = middle_95((counts @ top) / (counts @ bottom) - (counts @ their_top) / (counts @ their_bottom))
    value = top.sum() / bottom.sum() - their_top.sum() / their_bottom.sum()
    return Estimate(value.item(), low.item(), high.item(), len(top))
