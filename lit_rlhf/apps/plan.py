"""``plan.json`` and its table: what each stage will need, said before anything is trained."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from lit_rlhf.training.trace import Rates

MIB = 2**20


@dataclass
class Need:
    """What one process of a stage needs, in bytes and seconds.

    Gradients, cache and activations are not all there at the same time, so ``peak`` is less
    than the sum."""

    stage: str
    unit: str  # what a step is called: step, iteration, batch
    steps: int
    step_seconds: float | None  # None: there is no such device here to measure
    seconds: float | None  # of the whole stage, validation and sampling included
    flops: float  # of a step
    weights: int  # of all models that it holds
    gradients: int
    optimizer: int
    cache: int  # keys and values of rollouts
    activations: int  # of a forward and backward pass, logits included
    checkpoint: int  # on disk
    data: int
    peak: int


@dataclass
class Plan:
    """A whole run's needs, and by what they were worked out."""

    device: str
    precision: str
    threads: int
    rates: Rates | None
    process: int  # bytes of the process with its libraries, before there is a model
    stages: list[Need]
    unplanned: dict[str, str]  # stage -> why nothing can be said of it

    def write(self, path: Path) -> None:
        """``plan.json``."""
        path.parent.mkdir(parents=True, exist_ok=True)
        rates = None if self.rates is None else self.rates._asdict()
        path.write_text(json.dumps({**asdict(self), "rates": rates}, indent=2) + "\n", encoding="utf-8")

    def table(self) -> str:
        """For the terminal; memory in MiB."""
        columns = ("weights", "gradients", "optimizer", "cache", "activations", "checkpoint", "data", "peak")
        lines = [["", *columns, "a step", "steps", "in all"]]
        for need in self.stages:
            sizes = [f"{getattr(need, name) / MIB:,.0f}" if getattr(need, name) else "" for name in columns]
            times = [duration(need.step_seconds), f"{need.steps:,}", duration(need.seconds)]
            lines.append([need.stage, *sizes, *times])
        widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
        rows = [
            "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:]))])
            for line in lines
        ]
        return "\n".join([*rows, "", *self._notes()])

    def _notes(self) -> list[str]:
        where = f"{self.device}, {self.precision}, {self.threads} thread{'s' * (self.threads > 1)}"
        notes = [f"In MiB, a process; on {where}. The process with its libraries takes {self.process / MIB:,.0f} more."]
        if self.rates is None:
            notes.append(f"There is no {self.device} here to measure, so nothing is said about time.")
        else:
            flops, size, call = self.rates
            notes.append(
                f"Measured here: {flops / 1e9:,.0f} GFLOP/s in matrix products, {size / 1e9:,.1f} GB/s in copies, "
                f"{call * 1e6:.1f} us a call."
            )
        if any(need.seconds for need in self.stages):
            notes.append(f"All of it: {duration(sum(need.seconds or 0.0 for need in self.stages))}.")
        return notes + [f"{stage}: not planned: {reason}" for stage, reason in self.unplanned.items()]


def duration(seconds: float | None) -> str:
    """Seconds as people say them."""
    if seconds is None:
        return ""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
