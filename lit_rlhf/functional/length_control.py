"""Win rates as they would be if both sides' answers were equally long."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_rlhf.functional.interval import Z95, wilson_interval
from lit_rlhf.functional.rating import Texts, WinRate, comparisons

RIDGE = 0.01  # scikit-learn's C = 100, which AlpacaEval takes where it does not choose it by cross-validation


def length_controlled_win_rate(ours: Tensor, theirs: Tensor, texts: tuple[Texts, Texts]) -> WinRate:
    """AlpacaEval 2's length-controlled win rate (arXiv:2404.04475, eq. 2, without the difficulty of each prompt).

    ``ours`` (P, A) and ``theirs`` (P, B) are grades and ``texts`` the answers, as in
    :func:`~lit_rlhf.functional.win_rate`. Logistic regression tells how far the wins follow from length,
    ``P(win) = σ(θ + φ · tanh(d / std(d)))`` with d = our characters less theirs; ``mean`` is σ(θ), the chance at d = 0.
    A prompt counts once, however many answers it has. A ridge of 0.01 keeps θ and φ finite where one side always wins.

    The interval is σ(θ ± 1.96 standard errors), from the "sandwich" over prompts (White 1982); Wilson's where all is
    won or lost. NaN where no comparison counts. The paper's third term, the difficulty of each prompt, comes from many
    other models' answers to AlpacaEval's own prompts, and is not in it.

    >>> grades = torch.tensor([[1.0], [1.0], [1.0], [0.0]]), torch.tensor([[0.0], [0.0], [0.0], [1.0]])
    >>> texts = [["a long one"], ["a longer one"], ["short"], ["brief"]], [["ten"], ["ten"], ["ten"], ["ten chars."]]
    >>> found = length_controlled_win_rate(*grades, texts)
    >>> f"{found.mean:.3f} of {found.n}, where 0.75 were won"
    '0.729 of 4, where 0.75 were won'
    """
    wins = comparisons(ours, theirs, texts).flatten(1)  # (P, C)
    counts = ~wins.isnan()
    asked = counts.any(1)
    if not asked.any():
        return WinRate(math.nan, math.nan, math.nan, 0, 0)
    longer = _length_differences(texts).flatten(1)
    weights = counts / counts.sum(1, keepdim=True).clamp(min=1)
    spread = float(longer[counts].std()) if counts.sum() > 1 else 0.0
    inputs = torch.stack([torch.ones_like(longer), torch.tanh(longer / spread) if spread > 0 else 0 * longer], -1)
    theta, error = _intercept(inputs[asked], wins[asked].nan_to_num(0.5), weights[asked])
    mean, low, high = torch.sigmoid(theta + error * torch.tensor([0.0, -Z95, Z95], dtype=torch.float64)).tolist()
    prompts = int(asked.sum())
    if set((won := wins[counts]).tolist()) in ({0.0}, {1.0}):
        low, high = wilson_interval(won[0].item() * prompts, prompts)
    return WinRate(mean, low, high, int((~ours.isnan()).sum()), prompts)


def _length_differences(texts: tuple[Texts, Texts]) -> Tensor:
    """(P, A, B): characters of ours less those of theirs."""
    ours, theirs = (torch.tensor([[len(t) for t in row] for row in side], dtype=torch.float64) for side in texts)
    return ours[:, :, None] - theirs[:, None, :]


def _intercept(inputs: Tensor, wins: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """θ and its standard error by Newton's method, from ``inputs`` (P, C, 2), ``wins`` and ``weights`` (P, C)."""
    ridge = RIDGE * torch.eye(2, dtype=torch.float64)
    found = torch.zeros(2, dtype=torch.float64)
    for _ in range(100):
        chance = torch.sigmoid(inputs @ found)
        pulls = torch.einsum("pc,pcf->pf", weights * (wins - chance), inputs)  # of each prompt
        information = torch.einsum("pc,pcf,pcg->fg", weights * chance * (1 - chance), inputs, inputs) + ridge
        step = torch.linalg.solve(information, pulls.sum(0) - RIDGE * found)
        found = found + step / step.abs().max().clamp(min=1)  # no step is longer than a nat
        if step.abs().max() < 1e-10:
            break
    inverse = torch.linalg.inv(information)
    prompts = len(wins)
    variance = (pulls @ inverse)[:, 0].square().sum() * prompts / max(prompts - 1, 1)
    return found[0], variance.sqrt()
