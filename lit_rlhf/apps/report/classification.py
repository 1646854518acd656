"""Classification results: the confusion matrix of a classifier, and the accuracy behind k examples."""

from __future__ import annotations

from typing import Any, NamedTuple

from lit_rlhf.apps.charts import Chart, Drawing, Line, draw
from lit_rlhf.stages.stage import Tone

NUMBERED = 12  # labels; of more, the cells are too small for numbers
LONGEST = 16  # characters of a label's name in the drawing


class Confusion(NamedTuple):
    """Confusion matrix: true labels (rows) by predicted labels (columns)."""

    labels: list[str]
    counts: list[list[int]]
    size: float  # of a cell in the drawing
    margin: float  # above the cells and left of them, for the labels
    numbered: bool
    longest: int


def confusion(figures: dict[str, Any]) -> Confusion | None:
    """The matrix of a finished classification; None where there are no labels (multiple choice) or no such stage."""
    labels, counts = figures.get("labels"), figures.get("confusion")
    if not labels or not counts:
        return None
    numbered = len(labels) <= NUMBERED
    margin = 18.0 + 7.2 * min(LONGEST, max(map(len, labels)))
    return Confusion(labels, counts, 44.0 if numbered else max(8.0, 528.0 / len(labels)), margin, numbered, LONGEST)


class ShotsRow(NamedTuple):
    """Accuracy behind k examples, compared in each way."""

    k: int
    by: list[float | None]
    low: float | None
    high: float | None
    n: int
    too_long: int


class Shots(NamedTuple):
    """Accuracies for all numbers of examples."""

    ways: list[str]
    rows: list[ShotsRow]
    chart: Drawing | None  # None: there is one number only


def by_shots(figures: dict[str, Any]) -> Shots | None:
    """Accuracy against the number of examples of a finished few-shot evaluation."""
    shots = figures.get("shots")
    if not shots:
        return None
    ways = list(dict.fromkeys(way for row in shots.values() for way in row["by"]))
    rows = [
        ShotsRow(int(k), [row["by"].get(way) for way in ways], row["low"], row["high"], row["n"], row["too_long"])
        for k, row in shots.items()
    ]
    tones: tuple[Tone, ...] = ("teal", "pink", "amber")
    lines = [
        Line(way, tone, [(row.k, 100 * row.by[i]) for row in rows if row.by[i] is not None])
        for i, (way, tone) in enumerate(zip(ways, tones))
    ]
    drawn = [line for line in lines if len(line.points) > 1]
    guessing = figures.get("guessing") or 0.0
    chart = draw(Chart("Right", "%", "examples in the prompt", drawn, (100 * guessing, "guessing"))) if drawn else None
    return Shots(ways, rows, chart)
