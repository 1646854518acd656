"""Fill the disk, make it read-only or exceed its quota at the writes of each stage, and compare what it ends with.

    python benchmarks/full_disks.py [--every 1] [--only ppo]

Tried is the first, a middle and the last write of each file and folder, in the order in which they come. After each the
same command goes on, until the next: it has to end with one line that names file and reason, to leave nothing half
under its own name, and at last to come to what an undisturbed run comes to. Exit code 0: it does."""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from damage import Warm
from kills import SETTINGS, differing, result
from safetensors import safe_open

CODES = [errno.ENOSPC, errno.EROFS, errno.EDQUOT]
OWN = ["run=own", "from_run=quickstart"]
STAGES = {
    "pretrain": ["stage=pretrain", "run=own"],
    "sft": ["stage=sft", *OWN],
    "classify": ["stage=classify", *OWN],
    "preference": ["stage=preference", *OWN],
    "label_studio": ["stage=preference", "preference/annotator=label_studio", *OWN],
    "reward": ["stage=reward", *OWN],
    "ppo": ["stage=ppo", *OWN, "ppo.keep.best=true", "ppo.trainer.val_check_interval=1"],
    "dpo": ["stage=dpo", *OWN],
    "lora": ["stage=sft", *OWN, "sft.lora.r=2"],
    "evaluate": ["stage=evaluate", *OWN],
    "few_shot": ["stage=few_shot", *OWN],
    "plan": ["stage=plan", "run=own"],
    "sweep": ["-m", "stage=few_shot", *OWN, "seed=1,2", "hydra.sweep.dir=runs/own/sweeps/one"],
    "overwrite": ["stage=sft", *OWN, "overwrite=true"],
}
Case = tuple[str, int, int]  # writer, which of its writes, errno


class Faulty(Exception):
    """What a full disk came to that it should not have."""


class Disks:
    """A folder with a finished run, and a stage that is tried in another run beside it."""

    def __init__(self, folder: Path, finished: Path, command: Warm, arguments: list[str]) -> None:
        self.runs, self.command, self.arguments = folder / "runs", command, [*arguments, *SETTINGS]
        self.run, self.log = self.runs / "own", folder / "log"
        self.clear()
        (self.runs / "quickstart").symlink_to(finished.resolve())

    def start(self, **disk: Any) -> Any:
        """Start the command."""
        asked = {"folder": str(self.runs), **disk} if disk else None
        return self.command(self.arguments, self.runs.parent, disk=asked)

    def clear(self) -> None:
        """Remove all that was written."""
        shutil.rmtree(self.runs, ignore_errors=True)
        self.runs.mkdir(parents=True)

    def again(self) -> None:
        """Remove what the command has written, but for the finished run that it starts from."""
        for path in self.runs.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)

    def cases(self) -> list[Case]:
        """The first, a middle and the last write of each writer, of an undisturbed run."""
        self.log.unlink(missing_ok=True)
        done = self.start(log=str(self.log))
        if done.returncode:
            raise Faulty(done.stdout + done.stderr)
        writes = [tuple(json.loads(line)) for line in self.log.read_text().splitlines()]
        wanted = {(writer, n) for writer, most in dict(writes).items() for n in (1, (most + 1) // 2, most)}
        return [(*write, CODES[i % 3]) for i, write in enumerate(w for w in writes if w in wanted)]

    def go_through(self, chosen: Sequence[Case]) -> Iterator[Case]:
        """One case after the other, when ``cases()`` has run; each start goes on from what the one before has left.

        Where a write does not come any more, the stage has ended: it is begun anew."""
        expected = result(self.run)
        self.again()
        for case in chosen:
            done = self.start(fail=case)
            if done.returncode == 0:
                self.compare(expected, case)
                self.again()
                done = self.start(fail=case)
            self.check(done, case)
            yield case
        done = self.start()
        if done.returncode:
            raise Faulty(f"at the end: {done.stderr}")
        self.compare(expected, "at the end")

    def compare(self, expected: dict[str, str], when: Any) -> None:
        if differ := differing(result(self.run), expected):
            raise Faulty(f"{when}: differing: {', '.join(differ)}")

    def check(self, done: Any, case: Case) -> None:
        """Raise where the command did not end with one line that names file and reason, or a file is half written."""
        writer, _, code = case
        *jobs, last = done.stderr.splitlines() or [""]  # of a sweep, a line per job that failed, too
        sweep = "-m" in self.arguments
        if (
            done.returncode != 2
            or not last.startswith("lit-rlhf: ")
            or not all(sweep and re.match(r"job \d+ failed: ", line) for line in jobs)
        ):
            raise Faulty(f"{case}: exit code {done.returncode}: {done.stderr}")
        named = {writer, os.path.dirname(writer)}
        if not any(os.strerror(code) in line and any(name in line for name in named) for line in [*jobs, last]):
            raise Faulty(f"{case}: {done.stderr}")
        for file in (f for f in self.run.rglob("*") if f.is_file() and not f.parts[-2].endswith((".tmp", ".new"))):
            read = READERS.get(file.suffix) if file.name != "multirun.yaml" else None  # Hydra's, which nobody reads
            try:
                read(file) if read else None
            except Exception as error:
                raise Faulty(f"{case}: {file} is half written: {error}") from error


def read_lines(file: Path) -> None:
    """Read JSON lines; the half line of a writer who was stopped may be the last."""
    for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            json.loads(line)


def read_tensors(file: Path) -> None:
    with safe_open(file, "pt") as tensors:
        tensors.keys()


READERS: dict[str, Callable[[Path], Any]] = {
    ".json": lambda file: json.loads(file.read_text(encoding="utf-8")),
    ".yaml": lambda file: yaml.safe_load(file.read_text(encoding="utf-8")),
    ".ckpt": lambda file: torch.load(file, weights_only=True),
    ".safetensors": read_tensors,
    ".jsonl": read_lines,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="try one in so many")
    parser.add_argument("--only", nargs="*", default=list(STAGES))
    asked = parser.parse_args()
    faults = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        command = Warm(folder)
        done = command(SETTINGS, folder)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        finished = (folder / "runs" / "quickstart").rename(folder / "whole")
        for name in asked.only:
            passed = list[Case]()
            try:
                disks = Disks(folder, finished, command, STAGES[name])
                passed.extend(disks.go_through(disks.cases()[:: asked.every]))
            except Faulty as fault:
                faults += 1
                print(f"{name}: {fault}", flush=True)
            print(f"{name}: {len(passed)} disks, {len({case[0] for case in passed})} writers passed", flush=True)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
