"""Learning from comparisons: Bradley-Terry over all pairs of a ranking."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_rlhf.functional.masking import check_choice, check_shapes


class Pairs(NamedTuple):
    """Which answers of a batch are compared."""

    better: Tensor  # (M,) int64, index of the preferred answer
    worse: Tensor  # (M,) int64, index of the other one
    weight: Tensor  # (M,) float, 1 / (number of untied pairs of this prompt)
    prompts: int  # prompts that have at least one untied pair
    distance: Tensor  # (M,) int64, by how many ranks the two differ


def ranking_pairs(ranks: Tensor, prompt_index: Tensor) -> Pairs:
    """All C(K, 2) pairs inside each prompt, without the tied ones.

    ``ranks`` (N,) 1 = best; ``prompt_index`` (N,) says which prompt an answer belongs to. Pairs of one prompt
    share the weight 1, so that a prompt counts once however many answers it has (InstructGPT, section 3.5).

    >>> pairs = ranking_pairs(torch.tensor([2, 1, 2]), torch.tensor([0, 0, 0]))  # the second answer beats both others
    >>> pairs.better, pairs.worse, pairs.weight
    (tensor([1, 1]), tensor([0, 2]), tensor([0.5000, 0.5000]))
    """
    check_shapes(ranks=ranks, prompt_index=prompt_index)
    same_prompt = prompt_index[:, None] == prompt_index[None, :]
    better, worse = torch.nonzero(same_prompt & (ranks[:, None] < ranks[None, :]), as_tuple=True)
    owner = prompt_index[better]
    _, inverse, counts = torch.unique(owner, return_inverse=True, return_counts=True)
    return Pairs(better, worse, 1.0 / counts[inverse].float(), int(counts.numel()), ranks[worse] - ranks[better])


def ranking_loss(
    scores: Tensor, pairs: Pairs, margin: float = 0.0, label_smoothing: float = 0.0, margins: Tensor | None = None
) -> Tensor:
    """Bradley-Terry loss ``-1/C(K,2) E[log sigmoid(r_w - r_l)]`` (InstructGPT, eq. 1); a scalar.

    ``scores`` (N,), one per answer. The mean over each prompt's untied pairs, then over prompts; 0 if all are tied.
    ``margin`` is what ``r_w - r_l`` must exceed for each rank between the two (arXiv:2307.09288, eq. 2, with the rank
    distance as ``m``); ``margins`` (M,) is what it must exceed beside that in each pair, ``m(r)`` itself;
    ``label_smoothing`` is how often the annotator is thought to have erred.

    >>> pairs = ranking_pairs(torch.tensor([1, 2]), torch.tensor([0, 0]))
    >>> ranking_loss(torch.tensor([0.0, 0.0]), pairs)  # log 2: even odds
    tensor(0.6931)
    """
    gaps = scores[pairs.better] - scores[pairs.worse]
    if margin:
        gaps = gaps - margin * pairs.distance
    if margins is not None:
        check_shapes(margins=margins, gaps=gaps)
        gaps = gaps - margins
    right = (1 - label_smoothing) * F.logsigmoid(gaps) + label_smoothing * F.logsigmoid(-gaps)
    return -(right * pairs.weight).sum() / max(pairs.prompts, 1)


def feedback_loss(scores: Tensor, ratings: Tensor, form: Literal["logistic", "squared"] = "logistic") -> Tensor:
    """Mean loss of answers that were rated one by one, a scalar; 0 where none was.

    ``scores`` (N,); ``ratings`` (N,) ``y`` from 0 (worst) to 1 (best), NaN where an answer was not rated. Logistic:
    ``-y log sigmoid(r) - (1 - y) log sigmoid(-r)``, for thumbs; squared: ``(r - (2 y - 1))^2``, for ratings that the
    score itself is to repeat.

    >>> feedback_loss(torch.tensor([0.5, 3.0]), torch.tensor([1.0, torch.nan]), form="squared")
    tensor(0.2500)
    """
    check_choice("form", form, ("logistic", "squared"))
    check_shapes(scores=scores, ratings=ratings)
    rated = ~ratings.isnan()
    targets, given = ratings[rated], scores[rated]
    if form == "squared":
        losses = (given - (2 * targets - 1)) ** 2
    else:
        losses = F.binary_cross_entropy_with_logits(given, targets.to(given.dtype), reduction="none")
    return losses.sum() / max(int(rated.sum()), 1)


class Calibration(NamedTuple):
    """How often a model that says "p" is right, bin by bin; only bins that are not empty."""

    predicted: Tensor  # (B,) mean of the probabilities
    observed: Tensor  # (B,) share of them that came true
    counts: Tensor  # (B,) int64
    error: Tensor  # expected calibration error, a scalar from 0 to 1


def calibration(probabilities: Tensor, outcomes: Tensor, bins: int = 10, low: float = 0.0) -> Calibration:
    """Reliability of predictions (arXiv:1706.04599, section 2): ``ECE = sum n_b / M |observed_b - predicted_b|``.

    ``probabilities`` (M,) between ``low`` and 1 fall into ``bins`` of equal width; ``outcomes`` (M,) is 1 where the
    predicted came true. Raises ``ValueError`` without a prediction.

    >>> found = calibration(torch.tensor([0.8, 0.8, 0.8, 0.8]), torch.tensor([1, 1, 1, 0]))
    >>> found.observed, found.counts, found.error
    (tensor([0.7500], dtype=torch.float64), tensor([4]), tensor(0.0500, dtype=torch.float64))
    """
    check_shapes(probabilities=probabilities, outcomes=outcomes)
    if not probabilities.numel():
        raise ValueError("there is no prediction to calibrate")
    probabilities, outcomes = probabilities.double(), outcomes.double()
    place = ((probabilities - low) / (1 - low) * bins).long().clamp(0, bins - 1)
    sums = probabilities.new_zeros(bins)
    counts = sums.index_add(0, place, torch.ones_like(probabilities))
    filled = counts > 0
    predicted = sums.index_add(0, place, probabilities)[filled] / counts[filled]
    observed = sums.index_add(0, place, outcomes)[filled] / counts[filled]
    error = ((observed - predicted).abs() * counts[filled]).sum() / len(probabilities)
    return Calibration(predicted, observed, counts[filled].long(), error)


def correlation(x: Tensor, y: Tensor, group: Tensor) -> Tensor:
    """Pearson's correlation of ``x`` and ``y`` (N,) inside groups (N,), whose means are taken away; a scalar.

    NaN where one of them does not vary.

    >>> x, y, group = torch.tensor([1.0, 2.0, 8.0, 9.0]), torch.tensor([5.0, 6.0, 0.0, 1.0]), torch.tensor([0, 0, 1, 1])
    >>> correlation(x, y, group)  # inside both groups y rises with x, though it is lower in the second
    tensor(1., dtype=torch.float64)
    """
    check_shapes(x=x, y=y, group=group)
    _, member, counts = torch.unique(group, return_inverse=True, return_counts=True)

    def centred(values: Tensor) -> Tensor:
        values = values.double()
        means = values.new_zeros(len(counts)).index_add(0, member, values) / counts
        deviations: Tensor = values - means[member]
        return deviations

    a, b = centred(x), centred(y)
    found: Tensor = (a * b).sum() / ((a * a).sum() * (b * b).sum()).sqrt()
    return found


def pair_accuracy(scores: Tensor, pairs: Pairs) -> Tensor:
    """Fraction of untied pairs that ``scores`` (N,) order rightly; equal scores count half. NaN without a pair.

    >>> pairs = ranking_pairs(torch.tensor([1, 2, 3]), torch.tensor([0, 0, 0]))
    >>> pair_accuracy(torch.tensor([2.0, 3.0, 1.0]), pairs)
    tensor(0.6667)
    """
    margins = scores[pairs.better] - scores[pairs.worse]
    return ((margins > 0).float() + 0.5 * (margins == 0).float()).mean()


def dpo_loss(logprobs: Tensor, ref_logprobs: Tensor, pairs: Pairs, beta: float) -> Tensor:
    """``-E[log sigmoid(beta (log pi/ref (y_w) - log pi/ref (y_l)))]`` (arXiv:2305.18290, eq. 7); a scalar.

    ``logprobs`` and ``ref_logprobs`` (N,) are those of whole answers, in nats; ``beta`` in reward units per nat. It is
    :func:`ranking_loss` of the rewards that the policy implies, :func:`implicit_rewards`.

    >>> pairs = ranking_pairs(torch.tensor([1, 2]), torch.tensor([0, 0]))
    >>> logprobs = torch.tensor([-5.0, -7.0])
    >>> dpo_loss(logprobs, logprobs, pairs, beta=0.1)  # policy and reference are the same: log 2
    tensor(0.6931)
    """
    return ranking_loss(implicit_rewards(logprobs, ref_logprobs, beta), pairs)


def implicit_rewards(logprobs: Tensor, ref_logprobs: Tensor, beta: float) -> Tensor:
    """``beta log pi(y|x)/ref(y|x)`` (N,), the reward for which ``pi`` is optimal, up to a constant of the prompt.

    >>> implicit_rewards(torch.tensor([-5.0, -7.0]), torch.tensor([-6.0, -6.0]), beta=0.1)
    tensor([ 0.1000, -0.1000])
    """
    check_shapes(logprobs=logprobs, ref_logprobs=ref_logprobs)
    return beta * (logprobs - ref_logprobs)
