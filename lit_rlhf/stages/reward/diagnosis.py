"""Accuracy of a reward model by kind of prompt, annotator, rank distance and length; and whether it knows when."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lit_rlhf.functional import Pairs, calibration, correlation, ranking_pairs
from lit_rlhf.stages.rankings import RankedAnswers

BINS = 10  # of the calibration curve, from 50% to 100% sure
LENGTHS = ("less than half", "shorter", "equal", "longer", "more than double")
FEWEST = 5  # pairs of a group that is shown


def diagnosis(held_out: RankedAnswers) -> dict[str, Any]:
    """Figures from the scores of all held-out answers, on the CPU.

    ``calibration`` and ``calibration_error``: does the better-scored answer win as often as ``sigmoid`` of the
    difference says, by the annotator and, where there is one, by the gold judge (``gold_calibration_error``)?
    ``length_correlation``: of score and length inside a prompt, beside that of the annotator's preference.
    ``by``: accuracy and number of pairs in groups."""
    scores, ranks, owner, lengths = held_out[:4]
    pairs = ranking_pairs(ranks, owner)
    if not pairs.prompts:
        return {}
    found = {
        **_calibration(scores, pairs),
        "length_correlation": _known(correlation(scores, lengths, owner)),
        "annotator_length_correlation": _known(correlation(-ranks, lengths, owner)),
        "by": {
            name: _by(scores, pairs, name_of)
            for name, name_of in {
                "kind": lambda p: [held_out.kinds[i] for i in owner[p.better].tolist()],
                "annotator": lambda p: [held_out.annotators[i] for i in owner[p.better].tolist()],
                "distance": lambda p: [_apart(d) for d in p.distance.tolist()],
                "length": lambda p: [
                    _longer(a / b) for a, b in zip(lengths[p.better].tolist(), lengths[p.worse].tolist())
                ],
            }.items()
        },
    }
    if held_out.gold is not None:
        gold = ranking_pairs(-held_out.gold, owner)
        if not gold.prompts:  # all answers to a prompt were graded alike
            return found
        found["gold_calibration_error"] = _calibration(scores, gold)["calibration_error"]
        found["by"]["gold_kind"] = _by(scores, gold, lambda p: [held_out.kinds[i] for i in owner[p.better].tolist()])
    return found


def _calibration(scores: Tensor, pairs: Pairs) -> dict[str, Any]:
    """The pair's winner by score is predicted; equal scores are half right."""
    gaps = scores[pairs.better] - scores[pairs.worse]
    right = (gaps > 0).double() + 0.5 * (gaps == 0).double()
    curve = calibration(torch.sigmoid(gaps.abs()), right, BINS, low=0.5)
    rows = zip(curve.predicted.tolist(), curve.observed.tolist(), curve.counts.tolist())
    return {
        "calibration_error": curve.error.item(),
        "calibration": [{"predicted": p, "observed": o, "pairs": n} for p, o, n in rows],
    }


def _by(scores: Tensor, pairs: Pairs, name_of: Callable[[Pairs], list[str]]) -> dict[str, dict[str, Any]]:
    """group -> accuracy and pairs, in the order of the names or of ``LENGTHS``; none where there is one group only."""
    gaps = scores[pairs.better] - scores[pairs.worse]
    groups: dict[str, list[float]] = {}
    for name, gap in zip(name_of(pairs), gaps.tolist()):
        groups.setdefault(name, []).append(1.0 if gap > 0 else 0.5 if gap == 0 else 0.0)
    shown = {name: right for name, right in sorted(groups.items(), key=_place) if len(right) >= FEWEST}
    return {n: {"accuracy": sum(r) / len(r), "pairs": len(r)} for n, r in shown.items()} if len(shown) > 1 else {}


def _apart(distance: int) -> str:
    return "1 rank" if distance == 1 else f"{distance} ranks"


def _longer(ratio: float) -> str:
    """How long the preferred answer is, measured by the other."""
    bounds = (ratio >= 0.5, ratio >= 1, ratio > 1, ratio > 2)
    return LENGTHS[sum(bounds)]


def _place(group: tuple[str, Any]) -> tuple[int, str]:
    return (LENGTHS.index(group[0]) if group[0] in LENGTHS else 0, group[0])


def _known(value: Tensor) -> float | None:
    return None if value.isnan() else round(value.item(), 3)
