"""``metrics.csv``: every logged value, also with W&B off."""

from __future__ import annotations

import csv
import time
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only


class MetricsFile(Logger):
    """Writes one row a step and one column a metric, every few seconds and with each checkpoint.

    Unlike Lightning's CSV logger it keeps the rows of an interrupted run: the first value that is logged after a start
    drops only the rows of later steps, which are about to be repeated."""

    def __init__(self, path: str | Path, flush_seconds: float = 5.0) -> None:
        super().__init__()
        self.path = Path(path)
        self.flush_seconds = flush_seconds
        self._rows: dict[int, dict[str, float]] | None = None
        self._flushed = 0.0

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Settings stand in config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        step = 0 if step is None else step
        if self._rows is None:
            self._rows = {s: row for s, row in read_metrics(self.path).items() if s <= step}
        values = {k: float(v) for k, v in metrics.items() if k != "epoch"}
        self._rows.setdefault(step, {}).update(values)

    def save(self) -> None:
        """Lightning calls this after every value; a long file is not written anew each time."""
        if time.monotonic() - self._flushed > self.flush_seconds:
            self.write()

    @rank_zero_only
    def write(self) -> None:
        """Everything that was logged so far, under a temporary name first."""
        if not self._rows:
            return
        self._flushed = time.monotonic()
        columns = list(dict.fromkeys(name for row in self._rows.values() for name in row))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(self.path.name + ".tmp")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["step", *columns])
            writer.writeheader()
            writer.writerows({"step": step, **self._rows[step]} for step in sorted(self._rows))
        temporary.replace(self.path)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.write()


def read_metrics(path: str | Path) -> dict[int, dict[str, float]]:
    """step -> {metric: value} of a ``metrics.csv``; empty where there is no such file."""
    if not Path(path).is_file():
        return {}
    with Path(path).open(newline="", encoding="utf-8") as file:
        return {
            int(row.pop("step")): {name: float(value) for name, value in row.items() if value}
            for row in csv.DictReader(file)
        }
