"""Over-optimization: what is gained by gold as a proxy is pursued, against the distance from where it began.

The distance is ``d = sqrt(KL)``, KL in nats per answer (arXiv:2210.10760); gains are measured from ``d = 0``."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lit_rlhf.functional.masking import check_choice, check_shapes

Method = Literal["RL", "best of n"]


class GainFit(NamedTuple):
    """A curve of gains, ``d (alpha - beta log d)`` for RL and ``d (alpha - beta d)`` for best-of-n."""

    alpha: float  # gain per unit of distance, at first
    beta: float  # how that is lost; below 0 nothing is
    r2: float  # coefficient of determination; 1: every point lies on the curve


def fit_rl_gain(distance: Tensor, gain: Tensor) -> GainFit:
    """Least squares of ``R(d) = d (alpha - beta log d)``, for RL (arXiv:2210.10760, section 1); (M,) each, d >= 0.

    >>> distance = torch.tensor([1.0, 2.0, 4.0])
    >>> fit = fit_rl_gain(distance, rl_gain(distance, GainFit(alpha=2.0, beta=0.5, r2=1.0)))
    >>> round(fit.alpha, 6), round(fit.beta, 6)
    (2.0, 0.5)
    """
    return _fit(distance, gain, _rl_loss(distance))


def fit_best_of_n_gain(distance: Tensor, gain: Tensor) -> GainFit:
    """Least squares of ``R(d) = d (alpha - beta d)``, for best-of-n (arXiv:2210.10760, section 1); (M,) each.

    >>> distance = torch.tensor([1.0, 2.0, 4.0])
    >>> fit = fit_best_of_n_gain(distance, best_of_n_gain(distance, GainFit(alpha=2.0, beta=0.25, r2=1.0)))
    >>> round(fit.alpha, 6), round(fit.beta, 6)
    (2.0, 0.25)
    """
    return _fit(distance, gain, distance.double() ** 2)


def rl_gain(distance: Tensor, fit: GainFit) -> Tensor:
    """``d (alpha - beta log d)``, and 0 at d = 0.

    >>> rl_gain(torch.tensor([0.0, 1.0]), GainFit(alpha=2.0, beta=0.5, r2=1.0))
    tensor([0., 2.], dtype=torch.float64)
    """
    return fit.alpha * distance.double() - fit.beta * _rl_loss(distance)


def best_of_n_gain(distance: Tensor, fit: GainFit) -> Tensor:
    """``d (alpha - beta d)``

    >>> best_of_n_gain(torch.tensor([0.0, 2.0, 8.0]), GainFit(alpha=2.0, beta=0.25, r2=1.0))  # highest at d = 4
    tensor([0., 3., 0.], dtype=torch.float64)
    """
    return fit.alpha * distance.double() - fit.beta * distance.double() ** 2


def peak_kl(fit: GainFit, method: Method, reach: float) -> float | None:
    """KL, nats per answer, at which a fitted curve is highest; None where that is beyond the distance ``reach``, or
    nothing is lost: ``d = exp(alpha / beta - 1)`` for RL, ``d = alpha / (2 beta)`` for best-of-n.

    >>> round(peak_kl(GainFit(alpha=2.0, beta=0.25, r2=1.0), "best of n", reach=8.0), 6)  # d = 4
    16.0
    """
    check_choice("method", method, get_args(Method))
    if fit.alpha <= 0 or fit.beta <= 0:
        return None
    log_distance = fit.alpha / fit.beta - 1 if method == "RL" else math.log(fit.alpha / (2 * fit.beta))
    return math.exp(2 * log_distance) if log_distance <= math.log(reach) else None


def expected_best_of_n(worth: Tensor, scores: Tensor, n: int) -> Tensor:
    """Mean worth (P,) of the answer that scores best among n, over all subsets of n of a prompt's N answers.

    Unbiased, and of less variance than one draw of n (arXiv:2112.09332, appendix I). ``worth`` and ``scores`` are
    (P, N), n <= N; the answer of rank i from below is the best of C(i - 1, n - 1) of the C(N, n) subsets.

    >>> worth, scores = torch.tensor([[1.0, 2.0, 6.0]]), torch.tensor([[0.1, 0.3, 0.2]])
    >>> expected_best_of_n(worth, scores, n=2)  # the best of three pairs: 2, 6 and 2
    tensor([3.3333], dtype=torch.float64)
    """
    check_shapes(worth=worth, scores=scores)
    size = scores.shape[1]
    if not 1 <= n <= size:
        raise ValueError(f"n={n} of {size} answers; 1 to {size} was expected")
    weights = [math.comb(rank - 1, n - 1) / math.comb(size, n) for rank in range(1, size + 1)]
    ranked = worth.double().gather(1, torch.sort(scores, dim=1, stable=True).indices)
    return ranked @ torch.tensor(weights, dtype=torch.float64, device=worth.device)


def _rl_loss(distance: Tensor) -> Tensor:
    return torch.xlogy(distance.double(), distance.double())  # 0 at 0


def _fit(distance: Tensor, gain: Tensor, loss: Tensor) -> GainFit:
    """Of ``alpha distance - beta loss``; NaN where fewer than three points are known."""
    if len(gain) < 3:
        return GainFit(math.nan, math.nan, math.nan)
    gain = gain.double()
    columns = torch.stack([distance.double(), -loss], dim=1)
    solution = torch.linalg.lstsq(columns, gain[:, None]).solution
    rest = gain - (columns @ solution)[:, 0]
    r2 = 1 - rest.square().sum() / (gain - gain.mean()).square().sum()
    return GainFit(solution[0].item(), solution[1].item(), r2.item())
