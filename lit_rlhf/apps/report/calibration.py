"""Accuracy of a run's reward model by groups of pairs, and its calibration."""

from __future__ import annotations

from typing import Any, NamedTuple

from lit_rlhf.apps.charts import Chart, Line
from lit_rlhf.apps.display import number
from lit_rlhf.apps.run_reader import Run
from lit_rlhf.stages.reward import STAGE as REWARD

GROUPS = {  # of done.json: what they are called
    "kind": "Kind of prompt",
    "annotator": "Annotator",
    "distance": "Ranks between the two answers",
    "length": "Length of the preferred answer, against the other",
}


class Group(NamedTuple):
    """A group of held-out pairs."""

    name: str
    accuracy: float
    pairs: int
    gold: float | None  # accuracy by the gold judge, where there is one
    graded: int  # pairs of the gold judge, who sees no difference in some


def groups(run: Run) -> list[tuple[str, list[Group]]]:
    """(heading, groups); only groupings with more than one group."""
    by = run.of(REWARD).get("by") or {}
    found = []
    for key, heading in GROUPS.items():
        gold = by.get(f"gold_{key}") or {}
        rows = [
            Group(name, known["accuracy"], known["pairs"], graded.get("accuracy"), graded.get("pairs", 0))
            for name, known in (by.get(key) or {}).items()
            for graded in [gold.get(name, {})]
        ]
        if rows:
            found.append((heading, rows))
    return found


def calibration_chart(run: Run) -> Chart | None:
    """How often the better-scored answer wins, against how sure the scores are; None where it was not worked out."""
    figures: dict[str, Any] = run.of(REWARD)
    curve = figures.get("calibration")
    if not curve:
        return None
    points = [(100 * b["predicted"], 100 * b["observed"]) for b in curve]
    error = f"held out, {number(100 * figures['calibration_error'])} points off on average"
    lines = [
        Line("as right as sure", "grey", [(50.0, 50.0), (100.0, 100.0)], "dashed"),
        Line(error, "pink", points, "curve"),
        Line("", "pink", points, "dots"),
    ]
    return Chart("Calibration", "%", "how sure: sigmoid of the difference of scores, %", lines, x_from=50.0)
