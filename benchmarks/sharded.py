"""The most memory that each of two processes takes with sharded models (FSDP2), against one process.

    python benchmarks/sharded.py --checkpoint FOLDER [--cases SFT PPO] [--work FOLDER] [--set KEY=VALUE ...]

``--checkpoint`` is a language model of some 100 million parameters as a Hugging Face folder. SFT takes three steps of
four demonstrations, PPO two iterations of eight answers of 16 tokens, in float32 and on CPUs; two processes share them
out. PPO's reward model is the checkpoint with a fresh head. Off each process's peak (``ru_maxrss``) comes what the
first one held before it read anything: the interpreter and its libraries."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from memory import begun
from transformers import AutoModelForSequenceClassification, AutoTokenizer

COMMON = ("threads=1", "logger=csv", "callbacks.progress_bar=false", "model=hf", "trainer.precision=32-true")
CASES = {
    "SFT": (
        "stage=sft", "model.path={checkpoint}", "sft/data=jsonl", "sft.data.path={records}", "sft.trainer.max_steps=3",
        "sft.samples_every=100",
    ),
    "PPO": (
        "stage=ppo", "model.path={checkpoint}", "ppo.policy.path={checkpoint}", "ppo.reward_model.path={reward}",
        "ppo/data=jsonl", "ppo.data.path={records}", "ppo.data.limit_held_out=4", "ppo.trainer.limit_train_batches=2",
        "ppo.module.val_samples=1", "ppo.sampling.max_new_tokens=16", "ppo.samples_every=100",
    ),
}  # fmt: skip
BATCH = {"SFT": ("sft.data.batch_size", 4), "PPO": ("ppo.data.batch_size", 8)}


def make_inputs(checkpoint: Path, folder: Path) -> dict[str, Path]:
    """What the cases read, by the name that they call it."""
    reward, records = folder / "reward", folder / "records.jsonl"
    if not reward.exists():
        AutoModelForSequenceClassification.from_pretrained(checkpoint, num_labels=1).save_pretrained(reward)
        AutoTokenizer.from_pretrained(checkpoint).save_pretrained(reward)
    rows = [{"prompt": f"Count to {i}.", "response": " ".join(map(str, range(i, i + 20)))} for i in range(40)]
    records.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return {"checkpoint": checkpoint, "reward": reward, "records": records}


def peaks(settings: Sequence[str], processes: int, cwd: Path) -> list[float]:
    """The most GiB (``ru_maxrss``) of each process of a command."""
    command = [sys.executable, "-m", "lit_rlhf", *settings]
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    several = [{"RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": str(processes)} for i in range(processes)]
    begun = [
        subprocess.Popen(command, cwd=cwd, env={**env, **(own if processes > 1 else {})}, stdout=subprocess.DEVNULL)
        for own in several
    ]
    ended = [os.wait4(process.pid, 0) for process in begun]
    if any(status for _, status, _ in ended):
        sys.exit(f"{' '.join(command)}: the run failed")
    return [usage.ru_maxrss / 2**20 for _, _, usage in ended]


def measure(case: str, processes: int, inputs: dict[str, Path], folder: Path, more: Sequence[str]) -> list[float]:
    """GiB of each process, without the interpreter's own."""
    name, total = BATCH[case]
    settings = [setting.format(**inputs) for setting in CASES[case]] + [f"{name}={total // processes}"]
    if processes > 1:
        settings += ["trainer=fsdp", "trainer.accelerator=cpu", f"trainer.devices={processes}"]
    runs = folder / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    found = peaks([*COMMON, *settings, *more, "run=measured", f"paths.runs={runs.absolute()}"], processes, folder)
    done = json.loads((runs / "measured" / case.lower() / "done.json").read_text())
    return [size - done["memory"]["before_mib"] / 2**10 for size in found]


def main() -> None:
    """Measure, and print a table in Markdown."""
    with begun(__doc__, CASES, make_inputs) as (arguments, inputs, folder):
        print("| stage | one process | two, each | share |\n|---|---|---|---|")
        for case in arguments.cases:
            [one], two = (measure(case, processes, inputs, folder, arguments.set) for processes in (1, 2))
            both = " and ".join(f"{size:.2f}" for size in two)
            print(f"| {case} | {one:.2f} GiB | {both} GiB | {max(two) / one:.2f} |", flush=True)


if __name__ == "__main__":
    main()
