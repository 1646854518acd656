"""Answers of each model, and measures on them, prompt by prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lit_rlhf.functional import Estimate, distinct_ngrams, ratio, ratio_difference, self_similarity, wilson_interval

JudgeName = Literal["gold", "reward_model", "annotator"]


@dataclass
class Answers:
    """Answers of one model to P prompts, n samples each."""

    texts: list[list[str]] = field(default_factory=list)  # (P, n)
    scores: list[list[float]] = field(
        default_factory=list
    )  # (P, n), by the reward model, in SFT standard deviations where it knows them; NaN: it says nothing
    grades: list[list[dict[str, Any]]] = field(default_factory=list)  # (P, n), by the gold judge
    ranks: list[list[int]] = field(default_factory=list)  # (P, n), by the annotator, among all answers, 1 = best
    entropy: list[list[float]] = field(default_factory=list)  # (P, n), nats, summed over an answer's tokens
    tokens: list[list[int]] = field(default_factory=list)  # (P, n)
    kl: list[list[float]] = field(default_factory=list)  # (P, n), nats per answer, against SFT

    def add(self, others: Answers) -> None:
        """Append the answers to further prompts."""
        for known, new in zip(vars(self).values(), vars(others).values()):
            known += new


class Measured(NamedTuple):
    """A measure as a quotient of sums over prompts."""

    numerators: Tensor  # (P,)
    denominators: Tensor  # (P,)

    def estimate(self) -> Estimate:
        """Over all prompts, with its interval."""
        return ratio(*self)

    def share(self) -> Estimate:
        """The same of a share: Wilson's interval where all or none are counted, as resampling shows no spread then."""
        estimate = self.estimate()
        if estimate.value not in (0.0, 1.0):
            return estimate
        return Estimate(estimate.value, *wilson_interval(estimate.value * estimate.n, estimate.n), estimate.n)

    def change(self, before: Measured) -> Estimate:
        """Change of the measure since ``before``, over the same prompts."""
        return ratio_difference(self, before)


def measures(answers: Answers) -> dict[str, Measured]:
    """Everything that is known of a model's answers, by name."""
    texts, words = answers.texts, [[text.split() for text in row] for row in answers.texts]
    found: dict[str, Measured] = {}
    if answers.grades:
        for key in ("gold", "correct", "polite", "right"):
            found[key] = _mean([[grade[key] for grade in row] for row in answers.grades])
    if texts:
        found["words"] = _mean([[len(said) for said in row] for row in words])
    if answers.entropy:
        found["entropy"] = _sums(answers.entropy, answers.tokens)  # nats per token
    for key, rows in (("score", answers.scores), ("kl", answers.kl)):
        if any(known := [[x for x in row if not math.isnan(x)] for row in rows]):
            found[key] = _mean(known)
    for n in (1, 2):  # the mean over prompts of each prompt's distinct-n
        counts = [distinct_ngrams(row, n) for row in words]
        shares = [[distinct / total] if total else [] for distinct, total in counts]
        if any(shares):
            found[f"distinct_{n}"] = _mean(shares)
    if several := [row for row in words if len(row) > 1]:
        found["self_similarity"] = _mean([[self_similarity(row)] for row in several])
    if texts and len(texts[0]) > 1:  # share of a prompt's samples that are different texts
        found["different"] = _sums([[len(set(row))] for row in texts], [[len(row)] for row in texts])
    return found


def _mean(rows: Sequence[Sequence[float]]) -> Measured:
    return _sums(rows, [[1.0] * len(row) for row in rows])


def _sums(above: Sequence[Sequence[float]], below: Sequence[Sequence[float]]) -> Measured:
    top, bottom = ([float(sum(row)) for row in rows] for rows in (above, below))
    return Measured(torch.tensor(top, dtype=torch.float64), torch.tensor(bottom, dtype=torch.float64))


def estimates(answers: Answers) -> dict[str, Estimate]:
    """All measures with their intervals."""
    found = measures(answers)
    return {name: measured.share() if name == "right" else measured.estimate() for name, measured in found.items()}


def worth(answers: Answers, judge: JudgeName) -> Tensor:
    """Values (P, n) by which answers are compared, higher is better; empty where ``judge`` has said nothing."""
    if judge == "gold":
        return torch.tensor([[g["gold"] for g in row] for row in answers.grades], dtype=torch.float64)
    if judge == "annotator":
        return -torch.tensor(answers.ranks, dtype=torch.float64)
    return torch.tensor(answers.scores, dtype=torch.float64)
