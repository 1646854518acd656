"""Compares this package's PPO with TRL's: first the equations on the same tensors, then a small task trained by both.

    python benchmarks/against_trl.py              # both parts
    python benchmarks/against_trl.py --only equations

Makes an environment of its own with TRL, this package and a CPU build of torch, and goes on in there, from then on
without a network or a GPU. Ends with 1 if a quantity differs where it should not. docs/trl.md says what was found."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path

from environment import CACHE, PPO_TRL, ROOT, enter


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", type=Path, default=CACHE / "trl-1.12.0", help="folder of the environment")
    parser.add_argument("--only", choices=["equations", "curves"], help="one part alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--iterations", type=int, default=40, help="rollouts of 64 answers a training")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs/trl_curves.svg")
    arguments = parser.parse_args()
    enter(PPO_TRL, arguments.env)
    sys.exit(compare(arguments))


def compare(arguments: argparse.Namespace) -> int:
    """Both parts, inside the environment; 0 if all is as expected."""
    import torch
    import transformers
    from trl_comparison import curves, equations, task

    transformers.logging.set_verbosity_error()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)  # the same sums in the same order everywhere
    start = time.perf_counter()
    small = task.make_task()
    print(f"made the task in {time.perf_counter() - start:.0f} s", flush=True)
    unexpected = 0
    if arguments.only != "curves":
        start = time.perf_counter()
        rows = equations.rows(small)
        unexpected = sum(not row.as_expected for row in rows)
        print(f"\n{equations.table(rows)}\n\n{len(rows)} quantities in {time.perf_counter() - start:.0f} s", flush=True)
    if arguments.only != "equations":
        start = time.perf_counter()
        found = curves.train_all(small, arguments.seeds, arguments.iterations)
        curves.plot(found, arguments.plot)
        print(f"\n{curves.table(found, arguments.seeds)}\n\nin {time.perf_counter() - start:.0f} s: {arguments.plot}")
    return 1 if unexpected else 0


if __name__ == "__main__":
    main()
