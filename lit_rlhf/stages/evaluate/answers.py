"""What each model wrote, and what can be measured on it, prompt by prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_rlhf.functional import Estimate, distinct_ngrams, ratio, ratio_difference, self_similarity, wilson_interval


@dataclass
class Answers:
    """What one model wrote; P prompts, n samples each."""

    texts: list[list[str]] = field(default_factory=list)  # (P, n)
    scores: list[list[float]] = field(default_factory=list)  # (P, n), by the reward model, in SFT standard deviations
    grades: list[list[dict[str, Any]]] = field(default_factory=list)  # (P, n), by the gold judge
    ranks: list[list[int]] = field(default_factory=list)  # (P, n), by the annotator, among all answers, 1 = best
    entropy: list[list[float]] = field(default_factory=list)  # (P, n), nats, summed over an answer's tokens
    tokens: list[list[int]] = field(default_factory=list)  # (P, n)
    kl: list[list[float]] = field(default_factory=list)  # (P, n), nats per answer, against SFT


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
        """What was added since ``before``, over the same prompts."""
        return ratio_difference(self, before)


def measures(answers: Answers) -> dict[str, Measured]:
    """Everything that is known of a model's answers, by name."""
    found = {name: measure(answers) for name, measure in MEASURES.items()}
    return {name: measured for name, measured in found.items() if measured is not None}


def _mean(values: Callable[[Answers], Sequence[Sequence[float]]]) -> Callable[[Answers], Measured | None]:
    """A mean over all answers."""

    def measure(answers: Answers) -> Measured | None:
        rows = values(answers)
        return _sums(rows, [[1.0] * len(row) for row in rows]) if rows else None

    return measure


def _grade(key: str) -> Callable[[Answers], Measured | None]:
    return _mean(lambda answers: [[g[key] for g in row] for row in answers.grades])


def _entropy(answers: Answers) -> Measured | None:
    return _sums(answers.entropy, answers.tokens) if answers.entropy else None


def _distinct(n: int) -> Callable[[Answers], Measured | None]:
    """The mean over prompts of each prompt's distinct-n."""

    def measure(answers: Answers) -> Measured | None:
        counts = [distinct_ngrams([text.split() for text in row], n) for row in answers.texts]
        shares = [[distinct / total] if total else [] for distinct, total in counts]
        return _sums(shares, [[1.0] * len(row) for row in shares]) if any(shares) else None

    return measure


def _similarity(answers: Answers) -> Measured | None:
    rows = [[self_similarity([text.split() for text in row])] for row in answers.texts if len(row) > 1]
    return _sums(rows, [[1.0]] * len(rows)) if rows else None


def _different(answers: Answers) -> Measured | None:
    """Share of a prompt's samples that are different texts."""
    if not answers.texts or len(answers.texts[0]) < 2:
        return None
    return _sums([[len(set(row))] for row in answers.texts], [[len(row)] for row in answers.texts])


def _sums(above: Sequence[Sequence[float]], below: Sequence[Sequence[float]]) -> Measured:
    top, bottom = ([float(sum(row)) for row in rows] for rows in (above, below))
    return Measured(torch.tensor(top, dtype=torch.float64), torch.tensor(bottom, dtype=torch.float64))


MEASURES: dict[str, Callable[[Answers], Measured | None]] = {
    "gold": _grade("gold"),
    "correct": _grade("correct"),
    "polite": _grade("polite"),
    "right": _grade("right"),
    "words": _mean(lambda answers: [[len(text.split()) for text in row] for row in answers.texts]),
    "entropy": _entropy,  # nats per token
    "score": _mean(lambda answers: answers.scores),
    "kl": _mean(lambda answers: answers.kl),
    "distinct_1": _distinct(1),
    "distinct_2": _distinct(2),
    "self_similarity": _similarity,
    "different": _different,
}


def estimates(answers: Answers) -> dict[str, Estimate]:
    """All measures with their intervals."""
    found = measures(answers)
    return {name: measured.share() if name == "right" else measured.estimate() for name, measured in found.items()}


def worth(answers: Answers, judge: str) -> Tensor:
    """What the answers are compared by, (P, n), higher is better; empty where ``judge`` has said nothing."""
    if judge == "gold":
        return torch.tensor([[g["gold"] for g in row] for row in answers.grades], dtype=torch.float64)
    if judge == "annotator":
        return -torch.tensor(answers.ranks, dtype=torch.float64)
    return torch.tensor(answers.scores, dtype=torch.float64)
