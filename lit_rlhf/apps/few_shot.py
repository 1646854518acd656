"""``few_shot.html``: accuracy by prompt alone against pretraining steps and log parameters.

All of it is read from the sweep's folder; jobs that failed are named and left out."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from lit_rlhf.apps.charts import Chart, Drawing, Line, Points, draw
from lit_rlhf.apps.page import render
from lit_rlhf.apps.run_reader import load_run
from lit_rlhf.apps.sweep_reader import Job, load_jobs, varied
from lit_rlhf.errors import UserError
from lit_rlhf.files import write_text
from lit_rlhf.stages.few_shot import STAGE as FEW_SHOT
from lit_rlhf.stages.pretrain import STAGE as PRETRAIN
from lit_rlhf.stages.stage import Tone

TONES: tuple[Tone, ...] = ("blue", "orange", "green", "violet", "teal", "pink", "amber", "grey")


class Accuracies(NamedTuple):
    """Accuracies of one model for every number of examples."""

    job: str  # the settings in which it differs from the other jobs
    task: str
    parameters: int
    steps: int  # of pretraining; 0 where another run has it
    tokens: int | None
    loss: float | None  # held out, nats per token
    guessing: float
    shots: dict[int, tuple[float, float, float, int, int]]  # k: accuracy, its interval, n, tasks that do not fit


def write_few_shot(sweep: Path) -> Path:
    """Write ``few_shot.html`` into the folder of a sweep, with what its jobs left there; returns its path."""
    jobs = load_jobs(Path(sweep))
    differ = varied(jobs)
    models = [accuracies(job.folder, _settings(job, differ)) for job in jobs if job.done]
    if not any(model.shots for model in models):
        raise UserError(f"{sweep}: no job of a sweep has accuracies a model anything, so there is nothing to show")
    page = render(
        "few_shot.html.jinja",
        name="/".join(Path(sweep).resolve().parts[-3:]),
        models=models,
        ks=sorted({k for model in models for k in model.shots}),
        charts=[*against_size(models), *against_steps(models)],
        failed=[job for job in jobs if not job.done],
    )
    return write_text(Path(sweep) / "few_shot.html", page)


def accuracies(folder: Path, job: str) -> Accuracies:
    """The results of one job."""
    run = load_run(folder)
    figures, pretrain = run.of(FEW_SHOT), run.of(PRETRAIN)
    shots = {
        int(k): (row["accuracy"], row["low"], row["high"], row["n"], row["too_long"])
        for k, row in figures.get("shots", {}).items()
    }
    steps = max(run.course(PRETRAIN), default=0)
    known = (figures.get("task", ""), figures.get("parameters", 0), steps)
    return Accuracies(
        job, *known, pretrain.get("tokens"), pretrain.get("val_loss"), figures.get("guessing", 0.0), shots
    )


def _settings(job: Job, names: list[str]) -> str:
    """Names and values of settings, without the folders that they are in."""
    last = {name.rpartition(".")[2]: job.settings.get(name, "default") for name in names}
    return ", ".join(f"{name} {value.removesuffix('/model')[-40:]}" for name, value in last.items())


def against_size(models: list[Accuracies]) -> list[Drawing]:
    """Accuracy against the doublings of the parameters, a line for each number of examples, after most steps."""
    steps, smallest = max(model.steps for model in models), min(model.parameters for model in models)
    longest = [model for model in models if model.steps == steps]
    lines = _lines({f"k = {k}": _points(longest, k, lambda m: math.log2(m.parameters / smallest)) for k in _ks(models)})
    title = f"Right, after {steps:,} steps" if steps else "Right"
    return [_chart(title, f"doublings of {smallest:,} parameters", lines, models)] if lines else []


def against_steps(models: list[Accuracies]) -> list[Drawing]:
    """Accuracy against pretraining steps, a line for each size, behind each number of examples."""
    sizes = sorted({model.parameters for model in models})
    drawings = []
    for k in _ks(models):
        by_size = {
            f"{size:,}": _points([m for m in models if m.parameters == size], k, lambda m: float(m.steps))
            for size in sizes
        }
        if lines := _lines(by_size):
            drawings.append(_chart(f"Right, k = {k}", "steps of pretraining", lines, models))
    return drawings


def _chart(title: str, x_name: str, lines: list[Line], models: list[Accuracies]) -> Drawing:
    return draw(Chart(title, "%", x_name, lines, (100 * models[0].guessing, "guessing")))


def _ks(models: list[Accuracies]) -> list[int]:
    return sorted({k for model in models for k, row in model.shots.items() if row[3]})


def _points(models: list[Accuracies], k: int, place: Callable[[Accuracies], float]) -> Points:
    """(place, mean accuracy of the models there), in percent."""
    values: dict[float, list[float]] = {}
    for model in models:
        if k in model.shots and model.shots[k][3]:
            values.setdefault(place(model), []).append(100 * model.shots[k][0])
    return [(x, sum(y) / len(y)) for x, y in sorted(values.items())]


def _lines(points: dict[str, Points]) -> list[Line]:
    return [Line(label, tone, known) for (label, known), tone in zip(points.items(), TONES) if len(known) > 1]
