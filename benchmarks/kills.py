"""Kill the whole pipeline at random moments, by SIGKILL, and compare what it ends with.

    python benchmarks/kills.py --chains 20 --kills 15 [settings of lit-rlhf]

One chain runs to its end; each of the others is killed ``--kills`` times, at moments drawn anew, and started again by
the same command, until it ends. What differs is named. Exit code 0: nothing does.

Commands are forks of a process that has imported everything, so that kills come while they work."""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from lit_rlhf.pipeline.command import main as lit_rlhf

SETTINGS = ["debug=fast", "logger=csv", "threads=1", "callbacks.progress_bar=false"]
OFTEN = ["pretrain", "sft", "reward", "ppo"]  # stages that save checkpoints
WRITTEN = ["*/model/*.safetensors", "*/metrics.csv", "*/*.jsonl", "*/trained_prompts.txt"]


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["lit_rlhf.pipeline.rounds", "lit_rlhf.stages", "transformers.models.llama.modeling_llama"]
)


def run(arguments: list[str]) -> None:
    """What a process does that a command is: as from a shell, with nobody who reads."""
    nobody = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nobody, 1), os.dup2(nobody, 2)
    sys.argv = ["lit_rlhf", *arguments]
    lit_rlhf()


def start(runs: Path, settings: list[str]) -> multiprocessing.process.BaseProcess:
    """Start the pipeline in miniature, with a checkpoint every two steps."""
    often = [f"{stage}.checkpoint_every=2" for stage in OFTEN]
    process = FORKS.Process(target=run, args=([*SETTINGS, *often, f"paths.runs={runs}", *settings],))
    process.start()
    return process


def whole(runs: Path, settings: list[str]) -> float:
    """Run a chain that nothing stops; returns its seconds."""
    begun = time.monotonic()
    process = start(runs, settings)
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{runs}: the chain ended with exit code {process.exitcode}")
    return time.monotonic() - begun


def killed(runs: Path, settings: list[str], kills: int, seconds: float, draw: random.Random) -> int:
    """Run a chain that is killed up to ``kills`` times, within ``seconds`` of each start; returns how often it was."""
    done = 0
    for _ in range(kills):
        process = start(runs, settings)
        process.join(draw.uniform(0.02, 0.3) * seconds)
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        done += 1
    whole(runs, settings)
    return done


def result(run: Path) -> dict[str, str]:
    """What a run has come to: file -> digest, stage -> figures."""
    files = sorted(file for pattern in WRITTEN for file in run.glob(pattern))
    found = {str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    for file in sorted(run.glob("*/done.json")):
        done = json.loads(file.read_text(encoding="utf-8"))
        found[f"{file.parent.name} figures"] = json.dumps([done["figures"], done.get("weights")])
    return found


def differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """Names of what two runs do not have alike."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chains", type=int, default=4)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    asked, settings = parser.parse_known_args()
    total = wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        seconds = whole(Path(folder) / "whole", settings)
        expected = result(Path(folder) / "whole" / "quickstart")
        for chain in range(asked.chains):
            runs = Path(folder) / str(chain)
            kills = killed(runs, settings, asked.kills, seconds, random.Random(asked.seed + chain))
            found = differing(result(runs / "quickstart"), expected)
            total, wrong = total + kills, wrong + bool(found)
            print(f"chain {chain}: killed {kills} times; differing: {', '.join(found) or 'nothing'}", flush=True)
    print(f"{total} kills over {asked.chains} chains, {wrong} of which ended otherwise")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
