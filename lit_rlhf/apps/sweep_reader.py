"""Reading the folder of a sweep: its jobs, what each was asked, and how it ended."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

from lit_rlhf.apps.run_reader import numbers, read_summary
from lit_rlhf.errors import UserError
from lit_rlhf.files import Checked, read_json


class EndedJob(Checked):
    """``job.json``: how a job of a sweep ended."""

    status: str
    overrides: list[str]
    error: str = ""
    objective: str = "objective"
    value: float | None = None


class Job:
    """One job of a sweep, as its folder tells; one whose files are damaged has failed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, folder.name
        try:
            self.record: dict[str, Any] = read_json(folder / "job.json", EndedJob)
            figures = read_summary(folder)
        except UserError as error:
            self.record, figures = {"status": "damaged", "overrides": [], "error": str(error)}, {}
        self.status: str = self.record["status"]
        pairs = [o.lstrip("+~").split("=", 1) for o in self.record["overrides"]]
        self.settings: dict[str, str] = {p[0]: p[1] for p in pairs if len(p) == 2}
        self.figures = numbers(figures) if self.done else {}

    @property
    def done(self) -> bool:
        """Whether the job ended well."""
        return self.status == "done"

    @property
    def error(self) -> str:
        """Why the job failed."""
        return self.record.get("error", "")

    @property
    def objective(self) -> tuple[str, float]:
        """(address, value); NaN for a failed job."""
        value = self.record.get("value")
        return self.record.get("objective", "objective"), math.nan if value is None else float(value)


def load_jobs(sweep: Path) -> list[Job]:
    """The jobs that ended, well or not, in the order in which they were started."""
    jobs = [Job(file.parent) for file in Path(sweep).glob("*/job.json")]
    return sorted(jobs, key=lambda job: (int(job.name) if job.name.isdigit() else sys.maxsize, job.name))


def varied(jobs: list[Job]) -> list[str]:
    """The settings in which the jobs differ."""
    names = dict.fromkeys(name for job in jobs for name in job.settings)
    return [n for n in names if len({job.settings.get(n) for job in jobs}) > 1]
