"""Reading a run's folder; any subset of finished stages will do."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from lit_rlhf.apps.wording import STAGES
from lit_rlhf.errors import UserError
from lit_rlhf.training import read_metrics


@dataclass(frozen=True)
class Run:
    """What was read from the folder of a run; what is not there is left out."""

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
    health: list[dict[str, Any]] | None = None  # what the watch on PPO found; None: there was none

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


def load_run(path: Path) -> Run:
    """Read a run's folder."""
    summary = _read_json(path / "summary.json")
    done = {stage: _read_json(path / stage / "done.json") for stage in STAGES}
    done = {stage: record for stage, record in done.items() if record}
    metrics = {stage: read_metrics(path / stage / "metrics.csv") for stage in STAGES}
    metrics = {stage: rows for stage, rows in metrics.items() if rows}
    if not done and not metrics:
        raise UserError(f"{path}: no stage of a run is in this folder, so there is nothing to report on; run one first")
    files = [f for stage in STAGES for f in (path / stage / "done.json", path / stage / "metrics.csv") if f.is_file()]
    return Run(
        name=_run_name(path.resolve()),
        seed=summary.get("seed"),
        date=datetime.fromtimestamp(max(f.stat().st_mtime for f in files)),
        seconds={stage: record["seconds"] for stage, record in done.items() if record.get("seconds") is not None},
        figures={stage: record.get("figures") or {} for stage, record in done.items()},
        metrics=metrics,
        data={stage: record.get("data") or {} for stage, record in done.items()},
        versions={name: v for record in done.values() for name, v in (record.get("versions") or {}).items()},
        settings={s: _read_text(path / s / "config.yaml") for s in STAGES if (path / s / "config.yaml").is_file()},
        samples={stage: _read_jsonl(path / stage / "samples.jsonl") for stage in STAGES},
        health=_read_jsonl(watch) if (watch := path / "ppo" / "health.jsonl").is_file() else None,
    )


def _run_name(path: Path) -> str:
    """The folder's name; of a job of a sweep, or of a round, with the run that it belongs to."""
    if path.parent.parent.name == "sweeps":
        return "/".join(path.parts[-4:])
    return "/".join(path.parts[-3:]) if path.parent.name == "rounds" else path.name


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(_read_text(path)) if path.is_file() else {}


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    # Not splitlines(): a text may hold line separators of Unicode.
    return [json.loads(line) for line in _read_text(path).split("\n") if line.strip()]
