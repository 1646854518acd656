"""Gradient noise."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class GradientNoise(NamedTuple):
    """Noise of the gradients of several minibatches."""

    variance: float  # trace of their covariance
    signal: float  # squared norm of their mean, less the square of the mean's own error: it may come out below 0
    noise: float  # variance over signal, which no scaling of the loss changes (arXiv:1812.06162, eq. 2.9)


def gradient_noise(gradients: Iterable[Sequence[Tensor]]) -> GradientNoise:
    """Noise from n gradients, a tensor per parameter each; one at a time is held.

    >>> gradient_noise([[torch.tensor([1.0])], [torch.tensor([3.0])]])
    GradientNoise(variance=2.0, signal=3.0, noise=0.6666666666666666)
    """
    total: list[Tensor] = []
    squares, count = 0.0, 0
    for gradient in gradients:
        total = total or [torch.zeros_like(g, dtype=torch.float64) for g in gradient]
        for known, new in zip(total, gradient):
            known += new
            squares += new.double().square().sum().item()
        count += 1
    mean_square = sum(g.square().sum().item() for g in total) / count**2
    variance = (squares / count - mean_square) * count / max(count - 1, 1)
    signal = mean_square - variance / count
    return GradientNoise(variance, signal, variance / max(signal, 1e-12))
