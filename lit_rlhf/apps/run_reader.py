"""Reading a run's folder; any subset of finished stages will do."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import Field

from lit_rlhf.errors import UserError, say
from lit_rlhf.files import Checked, read_json, read_jsonl, read_text, read_yaml
from lit_rlhf.finished import changes, read_done
from lit_rlhf.stages.ppo import STAGE as PPO
from lit_rlhf.stages.stage import SFT_STD, Stage, all_stages
from lit_rlhf.training.metrics_file import read_metrics


class Summary(Checked):
    """The fields of ``summary.json`` that others read."""

    seconds: dict[str, float] = Field(default_factory=dict)


def read_summary(folder: Path) -> dict[str, Any]:
    """The headline figures of a run; nothing where no stage is finished."""
    return read_json(folder / "summary.json", Summary)


def numbers(node: Any, prefix: str = "") -> dict[str, float]:
    """Address -> value of all numbers."""
    if isinstance(node, dict):
        return {k: v for key, value in node.items() for k, v in numbers(value, f"{prefix}{key}.").items()}
    return {prefix[:-1]: node} if isinstance(node, int | float) and not isinstance(node, bool) else {}


@dataclass(frozen=True)
class Run:
    """A run as read from its folder; what is not there is left out."""

    name: str
    seed: Any
    date: datetime
    seconds: dict[str, float]  # of the finished stages
    figures: dict[str, dict[str, Any]]  # of the finished stages
    metrics: dict[str, dict[int, dict[str, float]]]
    data: dict[str, dict[str, Any]]
    versions: dict[str, Any]
    settings: dict[str, str]
    samples: dict[str, list[dict[str, Any]]]
    health: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # stage -> what a watch on it has found
    cost: dict[str, dict[str, float]] = field(default_factory=dict)  # of the finished stages, with their memory
    rounds: dict[str, dict[str, Any]] = field(default_factory=dict)  # number -> summary, where it went in rounds
    checkpoint: str = ""  # name of that which took the place of pretraining; "": there was none

    def of(self, stage: Stage) -> dict[str, Any]:
        """The figures of a stage; none where it is not finished."""
        return self.figures.get(stage.name, {})

    def course(self, stage: Stage) -> dict[int, dict[str, float]]:
        """The metrics of a stage by step; none where it has not begun."""
        return self.metrics.get(stage.name, {})

    @property
    def scored_by(self) -> str:
        """The source of PPO's scores; "" where it is not finished."""
        return self.of(PPO).get("scored_by", "reward model") if PPO.name in self.figures else ""

    @property
    def score_unit(self) -> str:
        """The unit of PPO's scores."""
        return self.of(PPO).get("score_unit", SFT_STD) if PPO.name in self.figures else "reward units"

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


def round_folders(run: Path) -> list[Path]:
    """The rounds of a run, the first one first."""
    return sorted((run / "rounds").glob("[0-9]*"), key=lambda folder: int(folder.name))


def newest(run: Path, inside: str) -> Path:
    """The path ``inside`` a run's folder, else inside that of the last round that has it."""
    folders = [run, *reversed(round_folders(run))]
    return next((folder / inside for folder in folders if (folder / inside).exists()), run / inside)


def _meant(path: Path) -> str:
    """What a folder is where a run was expected."""
    if path.name in all_stages() and (path / "done.json").is_file():
        return f"it is a stage of the run {path.parent}, which was expected"
    runs = sorted({str(file.parents[1]) for file in path.glob("*/*/done.json")})
    return f"it holds runs: {', '.join(runs[:5])}; name one" if runs else "run one first"


def load_run(path: Path) -> Run:
    """Read a run's folder; of stages that were gone through in rounds, the last round's."""
    summary = read_summary(path)
    folders = {stage: newest(path, stage) for stage in all_stages()}
    done = {stage: read_done(folder) for stage, folder in folders.items()}
    done = {stage: record for stage, record in done.items() if record}
    metrics = {stage: read_metrics(folder / "metrics.csv") for stage, folder in folders.items()}
    metrics = {stage: rows for stage, rows in metrics.items() if rows}
    if not done and not metrics:
        raise UserError(f"{path}: no stage of a run is in this folder; {_meant(path)}")
    files = [f for folder in folders.values() for f in (folder / "done.json", folder / "metrics.csv") if f.is_file()]
    seconds = {stage: record["seconds"] for stage, record in done.items() if record.get("seconds") is not None}
    if round_folders(path):  # of all rounds together
        seconds = {stage: value for stage, value in summary.get("seconds", {}).items() if stage in done}
    for stage, folder in folders.items():
        if stage not in done and folder.is_dir():
            say(f"report: {folder}: not finished (done.json is not there), so its figures are left out")
        for name, how in changes(folder).items():
            if not name.startswith(("model/", "adapter/")):  # who loads these says so
                say(f"report: {folder / name}: {how} since the stage ended")
    settings = {stage: known for stage, f in folders.items() if (known := read_yaml(f / "config.yaml"))}
    origins = [known.get("origin") or {} for known in settings.values()]
    return Run(
        name=_run_name(path.resolve()),
        seed=summary.get("seed"),
        date=datetime.fromtimestamp(max(f.stat().st_mtime for f in files)),
        seconds=seconds,
        figures={stage: record.get("figures") or {} for stage, record in done.items()},
        metrics=metrics,
        data={stage: record.get("data") or {} for stage, record in done.items()},
        versions={name: v for record in done.values() for name, v in (record.get("versions") or {}).items()},
        settings={stage: read_text(folders[stage] / "config.yaml") or "" for stage in settings},
        samples={stage: read_jsonl(folder / "samples.jsonl") for stage, folder in folders.items()},
        health={stage: read_jsonl(f) for stage in folders if (f := folders[stage] / "health.jsonl").exists()},
        cost={stage: {**record["cost"], **record["memory"]} for stage, record in done.items()},
        rounds={f.name: known for f in round_folders(path) if (known := read_summary(f))},
        checkpoint=next((Path(origin["checkpoint"]).name for origin in origins if origin.get("checkpoint")), ""),
    )


def _run_name(path: Path) -> str:
    """The folder's name; of a job of a sweep, or of a round, with the run that it belongs to."""
    if path.parent.parent.name == "sweeps":
        return "/".join(path.parts[-4:])
    return "/".join(path.parts[-3:]) if path.parent.name == "rounds" else path.name
