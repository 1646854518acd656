"""What was told right: the confusion matrix of a classifier, and the accuracy behind k examples."""

from __future__ import annotations

from typing import Any, NamedTuple

from lit_rlhf.apps.charts import Chart, Drawing, Line, draw

NUMBERED = 12  # labels; of more, the cells are too small for numbers
LONGEST = 16  # characters of a label's name in the drawing


class Cell(NamedTuple):
    """How often one label was taken for another; x and y in the drawing."""

    x: float
    y: float
    label: str
    told: str
    times: int
    share: float  # of the label's examples
    right: bool


class Confusion(NamedTuple):
    """The matrix as a drawing."""

    cells: list[Cell]
    names: list[tuple[str, float]]  # of the labels, and where the middle of each lies
    size: float  # of a cell
    left: float
    top: float
    width: float
    height: float
    numbered: bool


def confusion(figures: dict[str, Any]) -> Confusion | None:
    """The matrix of a finished classification; None where there are no labels (multiple choice) or no such stage."""
    labels, counts = figures.get("labels"), figures.get("confusion")
    if not labels or not counts:
        return None
    size = 44.0 if len(labels) <= NUMBERED else max(8.0, 528.0 / len(labels))
    names = [label if len(label) <= LONGEST else label[: LONGEST - 1] + "…" for label in labels]
    margin = 18.0 + 7.2 * max(map(len, names))
    cells = [
        Cell(margin + j * size, margin + i * size, labels[i], labels[j], n, n / max(sum(row), 1), i == j)
        for i, row in enumerate(counts)
        for j, n in enumerate(row)
    ]
    places = [(name, (i + 0.5) * size - 1) for i, name in enumerate(names)]
    side = margin + len(labels) * size
    return Confusion(cells, places, size, margin, margin, side + 0.7 * margin, side, len(labels) <= NUMBERED)


class ShotsRow(NamedTuple):
    """Accuracy behind k examples, compared in each way."""

    k: int
    by: list[float | None]
    low: float | None
    high: float | None
    n: int
    too_long: int


class Shots(NamedTuple):
    """All numbers of examples."""

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
    tones = ("train", "val", "gold")
    lines = [
        Line(way, tone, [(row.k, 100 * row.by[i]) for row in rows if row.by[i] is not None])
        for i, (way, tone) in enumerate(zip(ways, tones))
    ]
    drawn = [line for line in lines if len(line.points) > 1]
    guessing = figures.get("guessing") or 0.0
    chart = draw(Chart("Right", "%", "examples in the prompt", drawn, (100 * guessing, "guessing"))) if drawn else None
    return Shots(ways, rows, chart)
