"""Win rates and ratings, with their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lit_rlhf.functional.interval import FEW, Z95, middle_95, resampled, wilson_interval
from lit_rlhf.functional.masking import check_shapes

Texts = Sequence[Sequence[str]]  # (P, A): what a model wrote, A answers to each of P prompts


class WinRate(NamedTuple):
    """A win rate with its 95% interval."""

    mean: float  # 0..1, a tie counts half
    low: float
    high: float
    n: int  # comparisons
    prompts: int


def comparisons(ours: Tensor, theirs: Tensor, texts: tuple[Texts, Texts] | None = None) -> Tensor:
    """(P, A, B): 1 where our answer is better than theirs, 0.5 for a tie, NaN where one has no grade.

    Arguments as in :func:`pairwise_wins`.

    >>> comparisons(torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, math.nan]]))
    tensor([[[1.0000,    nan],
             [0.5000,    nan]]], dtype=torch.float64)
    """
    if len(ours) != len(theirs):
        raise ValueError(f"ours {tuple(ours.shape)} and theirs {tuple(theirs.shape)}: one row per prompt was expected")
    difference = ours[:, :, None] - theirs[:, None, :]
    wins = (difference > 0).double() + 0.5 * (difference == 0).double()
    if texts is not None:
        same = [[[a == b for b in row_b] for a in row_a] for row_a, row_b in zip(*texts, strict=True)]
        wins = wins.masked_fill(torch.tensor(same, device=wins.device).view(wins.shape), 0.5)
    return wins.masked_fill(difference.isnan(), math.nan)


def pairwise_wins(ours: Tensor, theirs: Tensor, texts: tuple[Texts, Texts] | None = None) -> Tensor:
    """Win rate (P,) per prompt: each of our A answers against each of their B, a tie half.

    ``ours`` (P, A) and ``theirs`` (P, B) are grades, higher is better. NaN: nobody graded it, and its comparisons do
    not count; a prompt on which none counts comes back as NaN. ``texts``, where they are known, are our answers
    (P, A) and theirs (P, B): equal texts tie, whatever they were graded. A score depends in its last bits on the batch
    in which it was computed, and a judge may be noisy.

    >>> grades = torch.tensor([[0.3]]), torch.tensor([[0.1 + 0.2 - 1e-7]])
    >>> pairwise_wins(*grades).item(), pairwise_wins(*grades, texts=([["Yes."]], [["Yes."]])).item()
    (1.0, 0.5)
    """
    return comparisons(ours, theirs, texts).nanmean((1, 2))


def win_rate(
    ours: Tensor, theirs: Tensor, texts: tuple[Texts, Texts] | None = None, *, resamples: int = 2000, seed: int = 0
) -> WinRate:
    """Mean win rate with a percentile bootstrap that resamples prompts (Efron 1979).

    ``ours`` (P, A), ``theirs`` (P, B) and ``texts`` as in :func:`pairwise_wins`. Answers to one prompt are not
    independent, so the prompts are resampled, not the answers. Prompts without a comparison are left out; NaN where
    all are. Where every comparison is won, or every one lost, and with fewer than ten prompts, resampling shows no
    spread, or too little; the interval is Wilson's then, over prompts: no rates between 0 and 1 are spread wider than
    wins and losses. ``n`` counts our graded answers, ``prompts`` the rows.

    >>> win_rate(torch.tensor([[3.0, 1.0], [2.0, 0.0]]).repeat(5, 1), torch.full((10, 2), 2.0))
    WinRate(mean=0.375, low=0.3, high=0.45, n=20, prompts=10)
    """
    wins = pairwise_wins(ours, theirs, texts)
    wins = wins[~wins.isnan()]
    if not len(wins):
        return WinRate(math.nan, math.nan, math.nan, 0, 0)
    mean = wins.mean().item()
    if mean in (0.0, 1.0) or len(wins) < FEW:
        low, high = wilson_interval(mean * len(wins), len(wins))
    else:
        low, high = (end.item() for end in middle_95(resampled(len(wins), resamples, seed) @ wins / len(wins)))
    return WinRate(mean, low, high, int((~ours.isnan()).sum()), len(wins))


def tournament(worths: Sequence[Tensor], texts: Sequence[Texts] | None = None) -> Tensor:
    """(P, M, M): the share of prompt p's comparisons that model i wins against model j, a tie half; 0 on the diagonal.

    ``worths`` are the M models' grades, (P, answers of that model) each, NaN where there is none, and ``texts`` their
    answers, of which equal ones tie.

    >>> tournament([torch.tensor([[3.0, 1.0]]), torch.tensor([[2.0, 1.0]])])
    tensor([[[0.0000, 0.6250],
             [0.3750, 0.0000]]], dtype=torch.float64)
    """
    models = range(len(worths))

    def met(i: int, j: int) -> Tensor:
        return pairwise_wins(worths[i], worths[j], None if texts is None else (texts[i], texts[j]))

    wins = torch.stack([torch.stack([met(i, j) for j in models], -1) for i in models], -2)
    return wins.nan_to_num(0.0) * (1 - torch.eye(len(worths), dtype=wins.dtype))  # nobody meets itself


def bradley_terry(wins: Tensor, prior: float = 0.5) -> Tensor:
    """Strengths (..., M), in nats and of mean 0, under which ``wins`` (..., M, M) are most likely.

    Model i beats j with probability ``σ(s_i − s_j)`` (Bradley & Terry 1952); ``wins[..., i, j]`` is how often it did,
    a tie half on either side. ``prior`` wins are added to both sides of each pair that has met (with two models and
    1/2, the Jeffreys prior): a model that has always won would else be infinitely strong. Raises ``ValueError`` where
    the models fall into groups that never met: nothing says how those compare.

    >>> wins = torch.tensor([[0.0, 30.0], [10.0, 0.0]])
    >>> strengths = bradley_terry(wins, prior=0.0)
    >>> (strengths[0] - strengths[1]).exp()  # odds of 3 to 1
    tensor(3.0000, dtype=torch.float64)
    """
    met = _met(wins)
    if not bool(_connected(met).all()):
        raise ValueError("the models fall into groups that never met each other, so they have no common scale")
    return _most_likely(wins.double() + prior * met)


class Ratings(NamedTuple):
    """Strengths (..., M) less the anchor's, in nats, with 95% intervals."""

    strengths: Tensor
    low: Tensor
    high: Tensor


def ratings(wins: Tensor, anchor: int = 0, prior: float = 0.5) -> Ratings:
    """Bradley-Terry strengths of M models from ``wins`` (..., P, M, M), :func:`tournament`'s, over P prompts.

    The intervals are 1.96 standard errors wide on either side, from the "sandwich" of the information with the spread
    of each prompt's share of the gradient (Huber 1967; White 1982): all models answer the same prompts, so one
    prompt's comparisons are not independent, and the information alone is too sure. Where a group of models has won,
    or lost, every comparison with the rest, there is no such spread, and between fewer than ten prompts too little; the
    errors are then at least those that the information (with the prior) gives. Raises ``ValueError`` as
    :func:`bradley_terry` does.

    >>> wins = tournament([torch.tensor([[2.0], [1.0], [2.0]]), torch.tensor([[1.0], [2.0], [1.0]])])
    >>> ratings(wins).strengths  # 2 of 3 prompts won, half a win added on either side: odds of 5 to 3
    tensor([ 0.0000, -0.5108], dtype=torch.float64)
    """
    total = wins.double().sum(-3)
    strengths = bradley_terry(total, prior)
    games = total + prior * _met(total)
    # The likelihood knows differences only: flattened in that direction, the information has an inverse.
    inverse = torch.linalg.inv(_information(games, strengths) + torch.ones_like(total))
    from_anchor = torch.eye(total.shape[-1], dtype=torch.float64)
    from_anchor = from_anchor - from_anchor[anchor]
    pull = _surplus(wins.double(), strengths[..., None, :]) @ inverse @ from_anchor.mT  # (..., P, M)
    prompts = wins.shape[-3]
    variance = pull.square().sum(-2) * prompts / max(prompts - 1, 1)
    independent = (from_anchor @ inverse @ from_anchor.mT).diagonal(dim1=-2, dim2=-1)
    perfect = ~_connected(total > 0)[..., None]
    no_spread = perfect | (prompts < FEW)
    half = Z95 * torch.where(no_spread, torch.maximum(variance, independent), variance).sqrt()
    strengths = strengths - strengths[..., anchor, None]
    return Ratings(strengths, strengths - half, strengths + half)


def elo(strengths: Tensor, anchor_rating: float = 1000.0) -> Tensor:
    """Strengths in nats on Elo's scale, where 400 points are odds of 10 to 1 (Elo 1978); 0 nats is the anchor's rating.

    All games at once, by maximum likelihood: unlike the ratings of a club, they do not depend on the games' order.

    >>> elo(torch.tensor([0.0, math.log(10)]))  # odds of 10 to 1
    tensor([1000., 1400.])
    """
    return anchor_rating + 400 / math.log(10) * strengths


def _met(wins: Tensor) -> Tensor:
    """(..., M, M) 1 for pairs that were compared."""
    return ((wins + wins.mT) > 0).double()


def _connected(edges: Tensor) -> Tensor:
    """(...): whether every model can be reached from every other along ``edges`` (..., M, M)."""
    steps = edges.double() + torch.eye(edges.shape[-1], dtype=torch.float64)
    reach = torch.linalg.matrix_power(steps.clamp(max=1), edges.shape[-1])
    connected: Tensor = (reach > 0).all(-1).all(-1)
    return connected


def _chance(strengths: Tensor) -> Tensor:
    """(..., M, M): with which probability i beats j."""
    return torch.sigmoid(strengths[..., :, None] - strengths[..., None, :])


def _surplus(games: Tensor, strengths: Tensor) -> Tensor:
    """Wins (..., M) beyond those that the strengths (..., M) let expect: the gradient of the log-likelihood."""
    return (games - (games + games.mT) * _chance(strengths)).sum(-1)


def _information(games: Tensor, strengths: Tensor) -> Tensor:
    """Fisher information (..., M, M) of the strengths."""
    chance = _chance(strengths)
    weight = (games + games.mT) * chance * (1 - chance)
    return torch.diag_embed(weight.sum(-1)) - weight


def _most_likely(games: Tensor) -> Tensor:
    """Newton's method for all of ``games`` (..., M, M) at once; no step is longer than a nat."""
    strengths: Tensor = games.new_zeros(games.shape[:-1])
    for _ in range(200):
        information = _information(games, strengths) + torch.ones_like(games)
        step = torch.linalg.solve(information, _surplus(games, strengths))
        step = step / step.abs().amax(-1, keepdim=True).clamp(min=1)
        strengths = strengths + step
        if step.abs().max() < 1e-5:  # the error is the square of the last step
            break
    return strengths


def best_of_n(grades: Tensor, scores: Tensor) -> Tensor:
    """Grade (P,) of the answer with the highest score of each prompt; ``grades`` and ``scores`` are (P, n).

    >>> best_of_n(grades=torch.tensor([[1.0, 5.0, 3.0]]), scores=torch.tensor([[0.2, 0.1, 0.9]]))
    tensor([3.])
    """
    check_shapes(grades=grades, scores=scores)
    return grades.gather(1, scores.argmax(1, keepdim=True)).squeeze(1)


def best_of_n_kl(n: int) -> float:
    """``log n - (n - 1) / n`` nats per answer: how far best-of-n is from the model it draws from (arXiv:2009.01325).

    Exact where all answers differ; where they repeat, an upper bound (arXiv:2401.01879).

    >>> best_of_n_kl(1), round(best_of_n_kl(16), 2)
    (0.0, 1.84)
    """
    return math.log(n) - (n - 1) / n
