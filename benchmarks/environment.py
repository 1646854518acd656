"""Environments of their own for the libraries that this package is compared with."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache/benchmarks"
PPO_TRL = "trl==1.12.0"  # the last one with a PPOTrainer
NEWEST_TRL = "trl>=1.16"  # the newest one when the environment is made; results say which
CPU_TORCH = "https://download.pytorch.org/whl/cpu"  # pip may choose CUDA's torch on Linux
READY = "benchmarks.ready"  # written when an environment is complete
SETTINGS = {
    "HF_HUB_OFFLINE": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "PYTHONWARNINGS": "ignore",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": str(ROOT),  # the checkout of this file, whoever made the environment
}


def enter(requirement: str, folder: Path | None = None) -> None:
    """Returns inside an environment with ``requirement``, this package and a CPU build of torch.

    Called elsewhere, and not for help, makes it where it is missing, runs the script again in there and ends with its
    exit status."""
    folder = folder or CACHE / requirement.replace(">=", "-").replace("==", "-")
    if {"-h", "--help"} & set(sys.argv[1:]):
        return  # help needs none
    if Path(sys.prefix).resolve() == folder.resolve():
        if cuda := [d.name for d in distributions() if d.name.startswith("nvidia-")]:
            sys.exit(f"packages for CUDA came with torch ({', '.join(cuda)}); remove {folder} and try again")
        return
    make(requirement, folder)
    command = [folder / "bin/python", Path(sys.argv[0]).resolve(), *sys.argv[1:]]
    sys.exit(subprocess.run(command, env={**os.environ, **SETTINGS}).returncode)


def make(requirement: str, folder: Path) -> None:
    """``requirement``, this package (editable) and torch without CUDA; a complete environment is taken as it is."""
    if (folder / READY).exists() and (folder / READY).read_text() == requirement:
        return
    print(f"making an environment with {requirement} in {folder}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n")
    venv.create(folder, with_pip=True)
    constraints = folder / "constraints.txt"  # without that of the peer itself, whose release the tests use another of
    pinned = (ROOT / "constraints/cpu.txt").read_text().splitlines(keepends=True)
    constraints.write_text("".join(line for line in pinned if not line.startswith("trl==")))
    pip = [folder / "bin/pip", "install", "--quiet", "--disable-pip-version-check", "-c", constraints]
    # A build of PyTorch's own index (2.13.0+cpu) comes before one of the same version from elsewhere; where that index
    # cannot be reached, pip takes what it finds, and enter() refuses CUDA's.
    subprocess.run([*pip, "torch", "--no-deps", "--retries", "1", "--extra-index-url", CPU_TORCH], check=True)
    subprocess.run([*pip, requirement, "-e", ROOT], check=True)
    (folder / READY).write_text(requirement)
