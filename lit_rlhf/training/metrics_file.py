"""``metrics.csv``: every logged value, also with W&B off."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only


class MetricsFile(Logger):
    """Writes one row per step and one column a metric, every few seconds and with each checkpoint.

    Unlike Lightning's CSV logger it keeps the rows of an interrupted run: the first value that is logged after a start
    drops only the rows of later steps, which are about to be repeated. New rows are appended; the file is written anew,
    under a temporary name first, where a row that it has or its columns change."""

    def __init__(self, path: str | Path, flush_seconds: float = 5.0) -> None:
        super().__init__()
        self.path = Path(path)
        self.flush_seconds = flush_seconds
        self._rows: dict[int, dict[str, float]] | None = None
        self._columns: list[str] = []  # of the file, in their order
        self._names: set[str] = set()  # of all figures so far
        self._changed: set[int] = set()  # steps that are not on disk as they are now
        self._last: int | None = None  # step of the file's last row; None: this start has not written it
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
            self._names = {name for row in self._rows.values() for name in row}
        values = {k: float(v) for k, v in metrics.items() if k != "epoch"}
        self._rows.setdefault(step, {}).update(values)
        self._names |= values.keys()
        self._changed.add(step)

    def save(self) -> None:
        """Lightning calls this after every value; a long file is not written anew each time."""
        if time.monotonic() - self._flushed > self.flush_seconds:
            self.write()

    @rank_zero_only
    def write(self) -> None:
        """Everything that was logged so far."""
        if not self._changed:
            return
        self._flushed = time.monotonic()
        last, self._last = self._last, None  # an append that fails leaves a file that must be written anew
        known = last is not None and len(self._columns) == len(self._names) and self.path.is_file()
        if known and min(self._changed) > last:
            with self.path.open("a", newline="", encoding="utf-8") as file:
                self._write_rows(file, self._changed)
        else:
            self._columns = list(dict.fromkeys(name for row in self._rows.values() for name in row))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.path.with_name(self.path.name + ".tmp")
            with temporary.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow(["step", *self._columns])
                self._write_rows(file, self._rows)
            temporary.replace(self.path)
        self._last = max(self._rows)
        self._changed.clear()

    def _write_rows(self, file: TextIO, steps: Iterable[int]) -> None:
        csv.writer(file).writerows([step, *map(self._rows[step].get, self._columns)] for step in sorted(steps))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.write()


def read_metrics(path: str | Path) -> dict[int, dict[str, float]]:
    """step -> {metric: value} of a ``metrics.csv``; empty where there is no such file.

    A line without its end, of a process that was killed as it wrote, is none."""
    if not Path(path).is_file():
        return {}
    with Path(path).open(newline="", encoding="utf-8") as file:
        return {
            int(row.pop("step")): {name: float(value) for name, value in row.items() if value}
            for row in csv.DictReader(line for line in file if line.endswith("\n"))
        }
