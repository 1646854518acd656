"""Weights & Biases: one run per stage, however often it is interrupted."""

from __future__ import annotations

import re
import shutil
from itertools import groupby
from pathlib import Path
from secrets import token_hex
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from lit_rlhf.files import damaged, make_folder, read_jsonl, read_text, write_text
from lit_rlhf.training.metrics_file import Stepped, read_metrics


class WandbRun(WandbLogger):
    """Lightning's logger; a stage that goes on goes on with its run, whose id stands in ``wandb/run_id`` of its folder.

    Offline, the new start first logs again what ``metrics.csv`` and ``samples.jsonl`` have up to there, and takes the
    earlier one's place: ``wandb sync`` uploads one run with all steps.

    Args:
        save_dir: the stage's folder.
        job_type: by which runs can be grouped, the stage's name.
        kwargs: of ``wandb.init``: tags, notes, entity and so on.
    """

    def __init__(self, save_dir: str, name: str, job_type: str, mode: str, **kwargs: Any) -> None:
        self._folder = Path(save_dir)
        file = self._folder / "wandb" / "run_id"
        run_id = (read_text(file) or "").strip() or None
        if run_id and not re.fullmatch(r"[\w-]+", run_id):
            raise damaged(file, f"{run_id[:40]!r} is no id of a run")
        self._earlier = [*file.parent.glob(f"offline-run-*-{run_id}")] if run_id and mode == "offline" else []
        if run_id is None:
            run_id = token_hex(4)
            make_folder(file.parent)
            write_text(file, f"{run_id}\n")
        super().__init__(save_dir=save_dir, name=name, version=run_id, job_type=job_type, mode=mode, **kwargs)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log what belongs to a step; the first time after an interruption, all steps before it."""
        if self._earlier and step is not None:
            if "samples" in metrics:  # of the step whose figures follow, with which it is logged: it is in the file
                return
            self._log_again(step, metrics)
        super().log_metrics(metrics, step)

    def _log_again(self, step: int, metrics: dict[str, float]) -> None:
        earlier, self._earlier = self._earlier, []
        samples = read_jsonl(self._folder / "samples.jsonl", Stepped)
        tables = {at: [*rows] for at, rows in groupby(samples, lambda row: row["step"])}
        rows = {at: row for at, row in read_metrics(self._folder / "metrics.csv").items() if at <= step}
        for at in sorted({*rows, *(at for at in tables if at <= step + 1)}):
            row = {name: value for name, value in rows.get(at, {}).items() if at < step or name not in metrics}
            if row:
                super().log_metrics(row, at)
            if at in tables:
                self.log_table("samples", columns=[*tables[at][0]], data=[[*r.values()] for r in tables[at]], step=at)
        for folder in earlier:
            shutil.rmtree(folder, ignore_errors=True)
