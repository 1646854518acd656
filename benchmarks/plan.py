"""What ``lit-rlhf stage=plan`` says, against what the stages then take: peak of memory, seconds a step.

    python benchmarks/plan.py [--models nano nano_qwen small] [--threads 1] [--work FOLDER]

Each stage runs for some steps, at its real shapes, in a process of its own. Its peak is what the process's resident
memory rises above what it was when all was imported and nothing was built. The plan is made with the same settings when
the rankings are there: answers of a model that has hardly been trained are longer than those of the demonstrations,
which would stand in for them. Writes ``benchmarks/results/plan.json``."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results" / "plan.json"
STAGES = ("pretrain", "sft", "preference", "reward", "ppo", "dpo")
FEW_STEPS = [
    "logger=csv", "callbacks.progress_bar=false",
    "pretrain.trainer.max_steps=12", "pretrain.trainer.val_check_interval=null",
    "sft.trainer.max_steps=12", "preference.data.limit=320", "preference.data.limit_held_out=64",
    "reward.trainer.max_steps=10", "ppo.trainer.limit_train_batches=3", "ppo.data.limit_held_out=128",
    "dpo.trainer.max_steps=10",
]  # fmt: skip
TIMED = """
import sys, time
from lightning.pytorch.callbacks import Callback
from lit_rlhf.pipeline import command, run

class Steps(Callback):
    begun, seconds = None, []
    def on_train_batch_start(self, *_):
        self.begun = time.perf_counter()
    def on_train_batch_end(self, *_):
        self.seconds.append(time.perf_counter() - self.begun)

callbacks = run.make_callbacks
run.make_callbacks = lambda *a: [*callbacks(*a), Steps()]
command.main()
print("seconds", *Steps.seconds)
"""


def lit_rlhf(folder: Path, threads: int, *overrides: str) -> str:
    """Run the command; returns what it prints."""
    command = [sys.executable, "-c", TIMED, f"threads={threads}", *FEW_STEPS, *overrides]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(overrides)}: {done.stderr[-2000:]}")
    return done.stdout


def compared(folder: Path, model: str, threads: int) -> list[dict[str, Any]]:
    """A row a stage."""
    measured = {}
    for stage in STAGES:
        said = lit_rlhf(folder, threads, f"run={model}", f"model={model}", f"stage={stage}")
        memory = json.loads((folder / "runs" / model / stage / "done.json").read_text())["memory"]
        steps = [float(s) for s in said.rsplit("seconds", 1)[-1].split()]
        measured[stage] = memory["peak_mib"] - memory["before_mib"], median(steps[1:]) if len(steps) > 1 else None
    begun = time.perf_counter()
    lit_rlhf(folder, threads, f"run={model}", f"model={model}", "stage=plan")
    print(f"{model}: planned in {time.perf_counter() - begun:.0f} s")
    plan = json.loads((folder / "runs" / model / "plan.json").read_text())
    rows = []
    for need in plan["stages"]:
        if need["stage"] in measured:
            peak, seconds = measured[need["stage"]]
            row = {"model": model, "stage": need["stage"], "planned_mib": need["peak"] / 2**20, "measured_mib": peak}
            rows.append({**row, "planned_seconds": need["step_seconds"], "measured_seconds": seconds})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown."""
    lines = ["| model | stage | peak, planned | measured | | a step, planned | measured | |", "|---" * 8 + "|"]
    for row in rows:
        sizes, times = ((row[f"planned_{x}"], row[f"measured_{x}"]) for x in ("mib", "seconds"))
        cells = [row["model"], row["stage"], f"{sizes[0]:,.0f} MiB", f"{sizes[1]:,.0f} MiB", f"{_off(*sizes):+.0f}%"]
        known = times[1] is not None
        cells += [f"{times[0]:.2g} s", f"{times[1]:.2g} s", f"{_off(*times):+.0f}%"] if known else ["", "", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _off(planned: float, measured: float) -> float:
    return 100 * (planned / measured - 1)


def main() -> None:
    """Compare, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["nano", "nano_qwen", "small"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, help="where the runs go; a temporary folder by default")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rows = [row for model in arguments.models for row in compared(folder, model, arguments.threads)]
    print(table(rows))
    import torch

    about = {"threads": arguments.threads, "machine": platform.machine(), "torch": torch.__version__}
    about |= {"libc": " ".join(platform.libc_ver()), "settings": FEW_STEPS}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
