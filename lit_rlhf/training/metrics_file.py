"""Files of a run, step by step: ``metrics.csv``, every logged value, also with W&B off; and lines of JSON."""

from __future__ import annotations

import csv
import json
import time
from io import StringIO
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from lit_rlhf.files import write_text


class MetricsFile(Logger):
    """Writes one row per step and one column a metric, every few seconds and with each checkpoint.

    Unlike Lightning's CSV logger it keeps the rows of an interrupted run: the first value that is logged after a start
    drops only the rows of later steps, which are about to be repeated. The file is written anew each time, under a
    temporary name first, and the more seldom the longer that takes."""

    def __init__(self, path: str | Path, flush_seconds: float = 5.0) -> None:
        super().__init__()
        self.path = Path(path)
        self.flush_seconds = flush_seconds
        self._rows: dict[int, dict[str, float]] | None = None
        self._changed = False  # whether there are figures that are not on disk
        self._due = 0.0  # when the file is written next

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
            self.path.parent.mkdir(parents=True, exist_ok=True)  # once: one that is deleted later is missed
            self._rows = {s: row for s, row in read_metrics(self.path).items() if s <= step}
        self._rows.setdefault(step, {}).update({k: float(v) for k, v in metrics.items() if k != "epoch"})
        self._changed = True

    def save(self) -> None:
        """Lightning calls this after every value; a long file is not written anew each time."""
        if time.monotonic() > self._due:
            self.write()

    @rank_zero_only
    def write(self, anew: bool = False) -> None:
        """Everything that was logged so far; ``anew``: into another file than before."""
        if not self._changed and not anew:
            return
        begun = time.monotonic()
        columns = list(dict.fromkeys(name for row in self._rows.values() for name in row))
        table = StringIO(newline="")
        csv.writer(table).writerow(["step", *columns])
        csv.writer(table).writerows([step, *map(self._rows[step].get, columns)] for step in sorted(self._rows))
        write_text(self.path, table.getvalue())
        took, self._changed = time.monotonic() - begun, False
        self._due = begun + max(self.flush_seconds, 50 * took)

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


def append_rows(path: Path, step: int, rows: list[dict[str, Any]]) -> None:
    """Append JSON lines; what an interrupted run had written of this step or later ones is dropped first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    old = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in old if json.loads(line)["step"] < step]
    lines = [*kept, *(json.dumps(row, ensure_ascii=False) for row in rows)]
    write_text(path, "".join(line + "\n" for line in lines))
