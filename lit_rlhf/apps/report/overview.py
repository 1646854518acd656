"""The stages of a run: which were run, what each of them reached, and what it read."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from typing import Any, NamedTuple

from lit_rlhf.apps.display import DATA, FIGURES, duration, figure, fill_template, number
from lit_rlhf.apps.run_reader import Run
from lit_rlhf.stages.pretrain import STAGE as PRETRAIN
from lit_rlhf.stages.stage import GRADES, SFT_STD, all_stages


class StageState(NamedTuple):
    """A stage of the pipeline in this run."""

    stage: str
    name: str
    state: str  # "done", "begun" or "absent"
    seconds: float | None
    share: float  # of the run's time
    note: str


def pipeline(run: Run) -> list[StageState]:
    """All stages in order; those of the pipeline that were not run, too."""
    total = run.total_seconds or 1.0
    states = []
    for stage, record in all_stages().items():
        state = "done" if stage in run.figures else "begun" if stage in run.metrics else "absent"
        if state == "absent" and not record.in_pipeline:
            continue
        seconds = run.seconds.get(stage)
        from_elsewhere = f"a checkpoint: {run.checkpoint}" if record.replaced_by_checkpoint and run.checkpoint else ""
        unfinished = {"begun": "not finished", "absent": from_elsewhere or "not in this run"}
        note = unfinished.get(state) or fill_template(record.note, run.figures[stage]) or ""
        states.append(StageState(stage, record.title, state, seconds, (seconds or 0.0) / total, note))
    return states


def stage_figures(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """(label, value with its unit) of a stage's plain figures."""
    found = []
    for key, value in figures.items():
        name, unit = FIGURES.get(key, (key, ""))
        unit = figures.get("score_unit", SFT_STD) if unit == SFT_STD else unit
        if isinstance(value, int | float | str):
            found.append((name, figure(value, unit) + ("" if unit in ("", "%", GRADES) else f" {unit}")))
    return found


def cost(run: Run) -> str:
    """What the run took, and what the package is made of, in a line; stages that older versions ran are left out."""
    of_cpus = sum(known.get("cpu_seconds", 0.0) for known in run.cost.values())
    tokens = run.of(PRETRAIN).get("tokens")
    parameters = max((known.get("parameters", 0) for known in run.cost.values()), default=0)
    peak = max((known.get("peak_mib", 0.0) for known in run.cost.values()), default=0.0)
    found = [
        f"{duration(run.total_seconds)} of wall time" if run.seconds else "",
        f"{duration(of_cpus)} of processor time" if of_cpus else "",
        f"{number(tokens)} tokens of pretraining" if tokens else "",
        f"{number(int(parameters))} parameters in the largest stage, all its models together" if parameters else "",
        f"at most {number(round(peak))} MiB" if peak else "",
    ]
    return ", ".join(filter(None, found))


def package_size() -> str:
    """Lines of Python of this package, and the packages that it asks for."""
    lines = sum(file.read_bytes().count(b"\n") for file in Path(__file__).parents[2].rglob("*.py"))
    try:
        needed = [line for line in requires("lit-rlhf") or [] if "extra ==" not in line]
    except PackageNotFoundError:  # run from a checkout
        needed = []
    return f"{number(lines)} lines of Python" + (f", {len(needed)} dependencies" if needed else "")


class Data(NamedTuple):
    """Counts (columns) of the stages' data (rows), and the lines behind a count."""

    names: list[str]
    rows: list[tuple[str, list[str]]]
    details: list[tuple[str, str, list[str]]]


def data_table(data: dict[str, dict[str, Any]]) -> Data | None:
    """What each stage read; a list stands for as many records as it has entries."""
    notes = {stage: dict(_flat(counts)) for stage, counts in data.items() if counts}
    keys = list(dict.fromkeys(key for counts in notes.values() for key in counts))
    keys.sort(key=lambda key: key in ("skipped", "long"))
    rows = [(stage, [_count(counts.get(key)) for key in keys]) for stage, counts in notes.items()]
    details = [
        (stage, _label(key), [str(line) for line in value[:20]])
        for stage, counts in notes.items()
        for key, value in counts.items()
        if isinstance(value, list) and value
    ]
    return Data([_label(key) for key in keys], rows, details) if rows else None


def _label(key: str) -> str:
    return DATA.get(key, key.replace("_", " "))


def _count(value: Any) -> str:
    return number(len(value) if isinstance(value, list) else value)


def _flat(notes: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in notes.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key} ")
        else:
            yield prefix + key, value
