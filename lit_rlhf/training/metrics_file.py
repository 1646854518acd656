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

from lit_rlhf.errors import UserError, say
from lit_rlhf.files import Checked, damaged, make_folder, read_jsonl, read_text, write_text


class MetricsFile(Logger):
    """Writes one row per step and one column per metric, every few seconds and with each checkpoint.

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
            make_folder(self.path.parent)  # once: one that is deleted later is missed
            self._rows = {s: row for s, row in read_metrics(self.path).items() if s <= step}
        self._rows.setdefault(step, {}).update({k: float(v) for k, v in metrics.items() if k != "epoch"})
        self._changed = True

    def save(self) -> None:
        """Lightning calls this after every value; a long file is not written anew each time."""
        if time.monotonic() > self._due:
            self.write()

    @property
    def rows(self) -> int:
        """Number of steps that have logged something."""
        return len(self._rows or {})

    def move(self, path: Path) -> None:
        """Write into another file from now on, with what was logged so far."""
        self.path, self._changed = path, self._rows is not None

    @rank_zero_only
    def write(self) -> None:
        """Write everything that was logged so far."""
        if not self._changed:
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
        try:
            self.write()
        except UserError as error:
            if status != "failed":
                raise
            say(str(error))  # what failed before is what the command ends with


def read_metrics(path: str | Path) -> dict[int, dict[str, float]]:
    """step -> {metric: value} of a ``metrics.csv``; empty where there is no such file.

    A last line without its end is none, and a line says so. Raises ``UserError``, naming the line, for other damage."""
    path, found = Path(path), dict[int, dict[str, float]]()
    *lines, half = (read_text(path) or "").split("\n")
    if half:
        say(f"{path}: its last line has no end; it is left out")
    table = csv.reader(lines, strict=True)
    try:
        first, *names = next(table, ["step"])
        if first != "step":
            raise ValueError(f"{first[:40]!r} was found, where 'step' was expected")
        for step, *values in table:
            if len(values) != len(names):
                raise ValueError(f"{1 + len(values)} fields, where {1 + len(names)} were expected")
            found[int(step)] = {name: float(value) for name, value in zip(names, values) if value}
    except (ValueError, csv.Error) as error:
        raise damaged(path, str(error), table.line_num) from None
    return found


class Stepped(Checked):
    """A row of ``samples.jsonl`` and the like, which a step of training has written."""

    step: int


def append_rows(path: Path, step: int, rows: list[dict[str, Any]]) -> None:
    """Append JSON lines; what an interrupted run had written of this step or later ones is dropped first."""
    make_folder(path.parent)
    kept = [row for row in read_jsonl(path, Stepped) if row["step"] < step]
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [*kept, *rows]))


def logged_rows(path: Path) -> int:
    """Number of rows in ``metrics.csv``, or in a file of JSON lines that steps have written."""
    return len(read_metrics(path) if path.suffix == ".csv" else read_jsonl(path, Stepped))
