"""What ``lit-rlhf stage=plan`` says, against the memory that the stages then take.

    python benchmarks/plan.py --checkpoint SmolLM2-135M-Instruct [--threads 1] [--work FOLDER]

Each stage runs for a few steps at its real shapes, in a process of its own; its peak is the most that the process had
in RAM (``memory`` in ``done.json``). The plan is made first, with the same settings, when there is nothing but the
checkpoint. SFT runs in two processes, too, by DDP and FSDP2; of them the one with more memory counts. Writes
``benchmarks/results/plan.json``."""

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
from typing import Any

from sharded import peaks

RESULTS = Path(__file__).parent / "results" / "plan.json"
STAGES = ("sft", "preference", "reward", "ppo", "dpo")
FEW_STEPS = [
    "run=plan", "model=hf", "logger=csv", "callbacks.progress_bar=false", "sft.samples_every=100",
    *(f"{stage}.trainer.max_steps=3" for stage in ("sft", "reward", "dpo")),
    *(f"{stage}.trainer.limit_val_batches=2" for stage in ("sft", "reward", "dpo")),
    "sft.data.limit=48", "preference.data.limit=24", "preference.data.limit_held_out=8",
    "preference.sampling.max_new_tokens=128", "ppo.sampling.max_new_tokens=128", "ppo.data.batch_size=32",
    "ppo.trainer.limit_train_batches=1", "ppo.data.limit_held_out=4", "ppo.module.val_samples=1",
]  # fmt: skip


def lit_rlhf(folder: Path, *overrides: str) -> float:
    """Run the command; returns the seconds that it took."""
    begun = time.perf_counter()
    command = [sys.executable, "-m", "lit_rlhf", *FEW_STEPS, *overrides]
    done = subprocess.run(command, cwd=folder, env=dict(os.environ), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(overrides)}: {done.stdout[-1000:]}{done.stderr[-2000:]}")
    return time.perf_counter() - begun


def compared(folder: Path, *settings: str) -> list[dict[str, Any]]:
    """A row per stage, in MiB."""
    print(f"planned in {lit_rlhf(folder, 'stage=plan', *settings):.0f} s", flush=True)
    plan = json.loads((folder / "runs" / "plan" / "plan.json").read_text())
    needs, rows = {need["stage"]: need for need in plan["stages"]}, []
    for stage in STAGES:
        lit_rlhf(folder, f"stage={stage}", *settings)
        measured = json.loads((folder / "runs" / "plan" / stage / "done.json").read_text())["memory"]["peak_mib"]
        rows.append({"stage": stage, "planned_mib": needs[stage]["host"] / 2**20, "measured_mib": measured})
        print(rows[-1], flush=True)
    return rows


def of_two(folder: Path, *settings: str) -> list[dict[str, Any]]:
    """Rows of SFT in two processes, the one with more memory, by DDP and FSDP2."""
    rows = []
    for trainer in ("ddp", "fsdp"):
        here = folder / trainer
        here.mkdir()
        several = [*settings, f"trainer={trainer}", "trainer.devices=2", "trainer.accelerator=cpu"]
        lit_rlhf(here, "stage=plan", *several)
        needs = json.loads((here / "runs" / "plan" / "plan.json").read_text())["stages"]
        planned = next(need["host"] for need in needs if need["stage"] == "sft") / 2**20
        measured = 1024 * max(peaks([*FEW_STEPS, "stage=sft", *several], 2, here))
        rows.append({"stage": f"sft, {trainer}, each of two", "planned_mib": planned, "measured_mib": measured})
        print(rows[-1], flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown."""
    lines = ["| stage | planned | measured | planned / measured |", "|---" * 4 + "|"]
    for row in rows:
        planned, measured = row["planned_mib"], row["measured_mib"]
        lines.append(f"| {row['stage']} | {planned:,.0f} MiB | {measured:,.0f} MiB | {planned / measured:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Compare, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, help="where the runs go; a temporary folder by default")
    parser.add_argument("overrides", nargs="*", help="further settings")
    arguments = parser.parse_args()
    settings = [
        f"model.path={Path(arguments.checkpoint).absolute()}",
        f"threads={arguments.threads}",
        *arguments.overrides,
    ]
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rows = [*compared(folder, *settings), *of_two(folder, *settings)]
    print(table(rows))
    import torch

    about = {"checkpoint": Path(arguments.checkpoint).name, "threads": arguments.threads, "torch": torch.__version__}
    about |= {"machine": platform.machine(), "libc": " ".join(platform.libc_ver()), "settings": FEW_STEPS}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
