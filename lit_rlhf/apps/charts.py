"""The curves of a run: which metrics share a chart, and where its lines and ticks lie in the drawing."""

# ruff: noqa: RUF001  minus signs, dashes and the multiplication sign are meant

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from lit_rlhf.apps.display import model_name, number, tone
from lit_rlhf.apps.run_reader import Run
from lit_rlhf.functional import best_of_n_kl
from lit_rlhf.stages.evaluate import STAGE as EVALUATE
from lit_rlhf.stages.ppo import STAGE as PPO
from lit_rlhf.stages.stage import SFT_STD, Tone, all_stages

POINTS_DRAWN = 300  # of a line; more are averaged


Points = list[tuple[float, float]]
Scale = Callable[[float], float]


class Line(NamedTuple):
    """A line of a chart: its label, the end of its CSS class, its points."""

    label: str
    tone: Tone
    points: Points
    style: str = "measured"  # with a trend or dots, as there are many points or few; "dots", "curve" or "dashed"


class Chart(NamedTuple):
    """A panel with its measured values."""

    title: str
    unit: str
    x_name: str
    lines: list[Line]
    reference: tuple[float, str] | None = None
    room: Sequence[tuple[float, float]] = ()  # also within the axes: charts that share it can be compared
    x_from: float = 0.0  # the axis begins here, or further left where a line does


def panels(run: Run, stage: str, folded: bool = False) -> Iterator[Chart]:
    """The charts of a stage for which more than one value was logged: those shown at once, or the ``folded`` ones."""
    rows, record = run.metrics.get(stage, {}), all_stages()[stage]
    counted, x_name = record.x_axis or ("", "optimizer steps")
    places = reached(rows, counted) if counted else {step: float(step) for step in rows}
    for panel in (panel for panel in record.panels if panel.folded is folded):
        scale = 100.0 if panel.unit == "%" else 1.0
        lines = []
        for place, (metric, label) in enumerate(panel.lines.items()):
            values = {step: row.get(metric, math.nan) for step, row in sorted(rows.items())}
            points = [(places[step], scale * value) for step, value in values.items() if math.isfinite(value)]
            held_out = metric.startswith("val/")
            tone: Tone = ("pink" if place < 2 else "amber") if held_out else ("teal" if place == 0 else "grey")
            if points:
                lines.append(Line(label, tone, points))
        if any(len(line.points) > 1 for line in lines):
            reference = panel.reference and (scale * panel.reference[0], panel.reference[1])
            unit = panel.unit.replace(SFT_STD, run.score_unit)
            yield Chart(panel.title, unit, x_name, lines, reference)


def frontier(run: Run) -> Iterator[Chart]:
    """Charts of gain against KL from the SFT model (arXiv:2009.01325), step by step.

    Beside PPO's rollouts and validations stand the models that were evaluated, and the best of n, in so far as they
    were scored alike."""
    rows = run.course(PPO)
    evaluation = run.of(EVALUATE)
    best = evaluation.get("best_of_n") or {}
    scores = run.score_unit if rows else SFT_STD
    alike = scores == SFT_STD  # as in evaluation, which has the reward model's scores
    for key, title, unit in (("score", "Score against KL", scores), ("gold", "Gold grade against KL", "points")):
        lines = [
            Line("PPO's rollouts", "teal", _against_kl(rows, f"ppo/{key}", "ppo/kl"), "dots"),
            Line("held out", "pink", _against_kl(rows, f"val/ppo/{key}", "val/ppo/kl")),
        ]
        for name, figures in (evaluation.get("models") or {}).items():
            if figures.get("kl") is not None and figures.get(key) is not None and (alike or key != "score"):
                lines.append(Line(model_name(name), tone(name), [(figures["kl"], figures[key])]))
        if best.get(key) is not None and (alike or key != "score"):
            point = (best_of_n_kl(best["n"]), best[key])
            lines.append(Line(model_name("best_of_n", best["n"]), tone("best_of_n"), [point]))
        lines = [line for line in lines if line.points]
        if sum(len(line.points) for line in lines) > 2:
            yield Chart(title, unit, "KL to SFT, nats per answer", lines)


def _against_kl(rows: dict[int, dict[str, float]], value: str, kl: str) -> Points:
    points = [(row.get(kl, math.nan), row.get(value, math.nan)) for _, row in sorted(rows.items())]
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def reached(rows: dict[int, dict[str, float]], metric: str) -> dict[int, float]:
    """step -> what a growing metric (PPO's episodes, say) has reached by then."""
    places, last = {}, 0.0
    for step in sorted(rows):
        last = rows[step].get(metric, last)
        places[step] = last
    return places


WIDTH, HEIGHT = 340.0, 190.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 12.0, 10.0, 38.0


class Tick(NamedTuple):
    at: float  # in the drawing
    label: str


class Stroke(NamedTuple):
    """A line of a chart, in the drawing's units."""

    label: str
    tone: Tone
    path: str
    trend: str  # smoothed, where it is noisy
    dots: list[tuple[float, float, str]]  # where there are few
    last: str
    style: str


class Drawing(NamedTuple):
    """A chart ready to be drawn."""

    chart: Chart
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    strokes: list[Stroke]
    reference: Tick | None


def draw(chart: Chart) -> Drawing:
    """The drawing of a chart: scales, ticks and paths."""
    points = [*(point for line in chart.lines for point in line.points), *chart.room]
    x_values, y_values = [x for x, _ in points], [y for _, y in points]
    if chart.reference:
        y_values.append(chart.reference[0])
    x_low, x_high = _widened(min(chart.x_from, *x_values), max(x_values))
    y_low, y_high = _widened(min(y_values), max(y_values))
    if chart.unit == "%":
        y_low, y_high = max(0.0, y_low), min(100.0, y_high)
    x_step, y_step = tick_step(x_low, x_high), tick_step(y_low, y_high)
    # A KL of -0.01 does not need an axis that begins at -1: a little may stick out.
    y_low, y_high = math.floor(y_low / y_step + 0.08) * y_step, math.ceil(y_high / y_step - 0.08) * y_step
    last = math.ceil(x_high / x_step) * x_step
    x_high = last if last - x_high < 0.06 * (last - x_low) else x_high  # a last tick, where little room is lost

    def x_at(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def y_at(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    strokes = [_stroke(line, x_at, y_at, chart.unit) for line in chart.lines]
    return Drawing(
        chart,
        [Tick(x_at(x), label) for x, label in ticks(x_low, x_high, x_step)],
        [Tick(y_at(y), label) for y, label in ticks(y_low, y_high, y_step)],
        strokes,
        Tick(y_at(chart.reference[0]), chart.reference[1]) if chart.reference else None,
    )


def _stroke(line: Line, x_at: Scale, y_at: Scale, unit: str) -> Stroke:
    label, tone, points, style = line
    if style in ("curve", "dashed"):
        return Stroke(label, tone, _path(points, x_at, y_at), "", [], "", style)
    suffix = "%" if unit == "%" else ""
    dots = [(x_at(x), y_at(y), f"{number(x)}: {number(y)}{suffix}") for x, y in points]
    if style == "dots":
        return Stroke(label, tone, "", "", dots, "", style)
    size = -(-len(points) // POINTS_DRAWN)
    thinned = [_mean(points[i : i + size]) for i in range(0, len(points), size)]
    trend = _path(_smoothed(thinned), x_at, y_at) if _noisy(thinned) else ""
    few = dots if len(points) <= 12 else []
    return Stroke(label, tone, _path(thinned, x_at, y_at), trend, few, number(points[-1][1]) + suffix, style)


def _path(points: Points, x_at: Scale, y_at: Scale) -> str:
    return "M" + "L".join(f"{x_at(x):.1f} {y_at(y):.1f}" for x, y in points)


def _mean(points: Points) -> tuple[float, float]:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)


def _noisy(points: Points) -> bool:
    """Whether a line jumps about so much that its course is hard to see."""
    values = [y for _, y in points]
    bends = [abs(after - 2 * here + before) for before, here, after in zip(values, values[1:], values[2:])]
    return len(points) > 20 and sum(bends) / len(bends) > 0.06 * (max(values) - min(values))


def _smoothed(points: Points) -> Points:
    """At each point the straight line that fits best an eighth of the line around it."""
    width = max(5, len(points) // 8)
    smooth = []
    for i, (x, _) in enumerate(points):
        first = min(max(0, i - width // 2), len(points) - width)  # as many points at the ends as elsewhere
        around = points[first : first + width]
        mean_x, mean_y = _mean(around)
        spread = sum((u - mean_x) ** 2 for u, _ in around)
        slope = sum((u - mean_x) * (v - mean_y) for u, v in around) / spread if spread else 0.0
        low, high = min(v for _, v in around), max(v for _, v in around)
        smooth.append((x, min(max(mean_y + slope * (x - mean_x), low), high)))
    return smooth


def _widened(low: float, high: float) -> tuple[float, float]:
    """A range that is not empty."""
    if high - low > 1e-9 * max(abs(low), abs(high)):
        return low, high
    margin = abs(low) / 2 or 1.0
    return low - margin, high + margin


def tick_step(low: float, high: float) -> float:
    """A round step that parts a range into about four."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999) * power


def ticks(low: float, high: float, step: float) -> Iterator[tuple[float, str]]:
    """Multiples of ``step`` from ``low`` to ``high`` with labels of equally many decimals."""
    for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1):
        yield i * step, _tick_label(i * step, step)


def _tick_label(value: float, step: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if step >= size / 10 and abs(value) >= size:
            return f"{value / size:g}{letter}".replace("-", "−")
    decimals = len(f"{step:.6f}".rstrip("0").split(".")[1])
    if decimals <= 4 and step >= 1e-4:
        return f"{value:.{decimals}f}".replace("-", "−")
    mantissa, exponent = f"{value:.2e}".split("e")  # more decimals do not fit beside the axis
    return f"{float(mantissa):g}e{int(exponent)}".replace("-", "−") if value else "0"
