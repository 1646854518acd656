"""All that is measured at the size of a checkpoint that people start from: a Llama of 135 million parameters.

    python benchmarks/checkpoint.py [--threads 1 2] [--work sft rollout]

Supervised fine-tuning against a padded loop and against TRL, rollouts against transformers' ``generate``, a PPO
iteration and reward pairs against TRL; in float32 and in bfloat16. Each is a case "135M..." of its own script, run in
the environment that it makes for itself. Takes about an hour per number of threads; ends with one table."""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from harness import RESULTS, load, table

WORKS = ("sft", "rollout", "ppo", "reward")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", nargs="+", default=["1"])
    parser.add_argument("--work", nargs="+", choices=WORKS, default=WORKS)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON files and the plots")
    arguments = parser.parse_args()
    for work in arguments.work:
        cases = [name for name in import_module(work).CASES if name.startswith("135M")]
        script = Path(__file__).with_name(f"{work}.py")
        command = [sys.executable, script, "--out", arguments.out, "--threads", *arguments.threads, "--cases", *cases]
        subprocess.run(command, check=True)
    found = [r for work in WORKS for r in load(arguments.out / f"{work}.json") if r.case.startswith("135M")]
    print(table(found))


if __name__ == "__main__":
    main()
