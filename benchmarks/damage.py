"""Damage each file of a whole run in each of several ways, and run the commands that read it.

    python benchmarks/damage.py [--every 7 --offset 0]

A command may end with one line that names what is damaged, or with what it ends with where nothing is: the same
results, or a line that names the file. Exit code 0: each does."""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from kills import result
from safetensors.torch import save

from lit_rlhf.finished import CARD

SETTINGS = ["debug=fast", "logger=csv", "threads=1", "callbacks.progress_bar=false", "model=pico"]
SETTINGS += ["ppo.keep.best=true", "ppo.trainer.val_check_interval=2", "sft.lora.r=2"]
AFTER = {"pretrain": "sft", "sft": "preference", "preference": "reward", "reward": "ppo", "ppo": "evaluate"}
Command = Callable[[list[str], Path], "subprocess.CompletedProcess[str]"]


def other(file: Path) -> bytes:
    """Something else than what belongs into a file, in its own format where that is not text."""
    if file.suffix == ".ckpt":
        torch.save([1], buffer := io.BytesIO())
        return buffer.getvalue()
    return save({"odd": torch.zeros(1)}) if file.suffix == ".safetensors" else b"[1]\n"


def scrambled(file: Path) -> bytes:
    data = bytearray(file.read_bytes())
    middle, some = len(data) // 2, random.Random(0).randbytes(16)
    return bytes(data[: middle - 8] + some + data[middle + 8 :])


def folder_instead(file: Path) -> None:
    file.unlink()
    file.mkdir()


def unreadable(file: Path) -> None:
    """A disk that fails: for the superuser, too, who may read what he likes."""
    file.unlink()
    file.symlink_to("/proc/self/mem")


def becomes(content: Callable[[Path], bytes]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        data = content(file)
        file.unlink()  # it may be a link to that of another copy
        file.write_bytes(data)

    return damage


DAMAGES = {
    "empty": becomes(lambda file: b""),
    "cut": becomes(lambda file: file.read_bytes()[: file.stat().st_size // 2]),
    "half a character": becomes(lambda file: file.read_bytes() + b"\xe2\x82"),
    "random bytes": becomes(scrambled),
    "wrong type": becomes(other),
    "folder": folder_instead,
    "unreadable": unreadable,
    "deleted": Path.unlink,
}


class Trial(NamedTuple):
    """A command on a run of which one file is damaged."""

    file: str  # in the run's folder
    damage: str
    arguments: list[str]
    unfinished: str | None = None  # the stage that is to go on: its done.json is taken away


def trials(run: Path) -> Iterator[Trial]:
    """All of a finished run's files but models' cards, which are people's; damages, and the commands that read them."""
    read = ["model", "adapter", "config.yaml", "done.json", "trained_prompts.txt"]
    for file in sorted(file for file in run.rglob("*") if file.is_file() and not file.name.startswith(".")):
        if file.name == CARD:
            continue
        name = str(file.relative_to(run))
        stage, inside = name.split("/")[0], name.split("/")[1:]
        for damage in DAMAGES:
            if stage == "data":
                yield Trial(name, damage, ["stage=reward", "run=quickstart", "overwrite=true"])
                yield Trial(name, damage, ["stage=label", "label.port={port}"])
                continue
            yield Trial(name, damage, ["stage=report"])
            if not inside:
                continue
            yield Trial(name, damage, [f"stage={stage}"])
            if inside[0] in read and stage in AFTER:
                yield Trial(name, damage, [f"stage={AFTER[stage]}", "run=next", "from_run=quickstart"])
            if inside[0] == "model" and stage != "reward":
                yield Trial(name, damage, ["stage=chat", f"chat.model=runs/quickstart/{stage}/model"])
            if inside[0] not in ("model", "adapter", "done.json", "trained_prompts.txt"):
                yield Trial(name, damage, [f"stage={stage}"], unfinished=stage)


def copied(run: Path, to: Path) -> None:
    """A copy of a run; large files, which are only ever replaced whole, are shared with it."""
    large = (".ckpt", ".safetensors")
    shutil.copytree(run, to, copy_function=lambda a, b: (os.link if a.endswith(large) else shutil.copy)(a, b))


def try_one(trial: Trial, run: Path, command: Command, folder: Path, expected: dict[str, str], port: int) -> str:
    """What is wrong with how a command ends; "" where nothing is."""
    runs = folder / "runs"
    shutil.rmtree(runs, ignore_errors=True)
    copied(run, runs / "quickstart")
    if trial.unfinished and trial.unfinished != "preference":
        (runs / "quickstart" / trial.unfinished / "done.json").unlink()
    DAMAGES[trial.damage](runs / "quickstart" / trial.file)
    done = command([*SETTINGS, *(a.format(port=port) for a in trial.arguments)], folder)
    said = done.stderr.strip()
    named = Path(trial.file).name in done.stdout + said or f"/{Path(trial.file).parts[0]} " in said
    if done.returncode == 0:
        return "" if named or not reads(trial) or restored(trial, run, runs / "quickstart", expected) else "in silence"
    if done.returncode != 2 or said.count("\n") or not said.startswith("lit-rlhf: ") or "Error" in said:
        return f"code {done.returncode}: {said[-300:]}"
    if trial.arguments[0] == "stage=label" and "cannot listen" in said:
        return "in silence" if reads(trial) else ""
    return "" if named else f"not named: {said}"


def reads(trial: Trial) -> bool:
    """Whether a command looks at the file."""
    file, command = Path(trial.file), trial.arguments[0]
    if file.parts[0] == "data":
        return file.name.startswith("answers" if command == "stage=label" else "rankings")
    if command == "stage=report":
        return file.name in REPORTED and len(file.parts) == 2
    if file.parts[1] == "checkpoints":
        return trial.unfinished is not None
    of_own_stage = file.parts[1] == "adapter" or trial.file == "preference/done.json"  # which has no model
    return not of_own_stage or command == f"stage={file.parts[0]}"


def restored(trial: Trial, whole: Path, run: Path, expected: dict[str, str]) -> bool:
    """Whether a run has all that it had, the file that was damaged included."""
    file = run / trial.file
    if not file.is_file() or file.is_symlink():
        return False
    anew = file.name == "done.json" or file.suffix == ".ckpt"  # with other seconds in it
    same = anew or file.read_bytes() == (whole / trial.file).read_bytes()
    try:
        now = result(run)
    except ValueError:  # a done.json that is as damaged as it was
        return False
    return same and all(now.get(name) == known for name, known in expected.items())


REPORTED = ("done.json", "config.yaml", "metrics.csv", "samples.jsonl", "health.jsonl")


class Warm:
    """Runs commands in forks of a process that has imported everything."""

    def __init__(self, folder: Path) -> None:
        root = Path(__file__).resolve().parents[1]
        self.env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        self.files = {name: str(folder / name) for name in ("stdout", "stderr")}
        program = [sys.executable, str(root / "tests" / "pipeline" / "warm.py")]
        self.process = subprocess.Popen(program, env=self.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, arguments: list[str], cwd: Path, **more: Any) -> subprocess.CompletedProcess[str]:
        asked = {"arguments": arguments, "cwd": str(cwd), "env": self.env, **self.files, **more}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        code = int(self.process.stdout.readline())
        said = [Path(file).read_text(encoding="utf-8", errors="replace") for file in self.files.values()]
        return subprocess.CompletedProcess(arguments, code, *said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="try one in so many")
    parser.add_argument("--offset", type=int, default=0)
    parser.add_argument("--run", type=Path, help="a finished run; else it is made")
    parser.add_argument("--only", default="")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        command = Warm(folder)
        port = taken_port()
        if asked.run is None:
            done = command(SETTINGS, folder)
            if done.returncode:
                sys.exit(done.stdout + done.stderr)
            (folder / "runs" / "quickstart").rename(folder / "whole")
        run = asked.run or folder / "whole"
        expected, counts = result(run), Counter[str]()
        chosen = [t for t in trials(run) if asked.only in " ".join([t.file, t.damage, *t.arguments])]
        for trial in chosen[asked.offset :: asked.every]:
            fault = try_one(trial, run, command, folder, expected, port)
            counts["passed" if not fault else "failed"] += 1
            if fault:
                going = " (going on)" if trial.unfinished else ""
                print(f"{trial.file}, {trial.damage}, {trial.arguments}{going}: {fault}", flush=True)
        print(f"{len({t.file for t in chosen})} files, {len(DAMAGES)} damages: {dict(counts)}")
        sys.exit(bool(counts["failed"]))


def taken_port() -> int:
    """A port at which nobody else can listen: a page gets no further than having read its files."""
    import socket

    keep = socket.create_server(("127.0.0.1", 0))
    KEPT.append(keep)
    return int(keep.getsockname()[1])


KEPT: list[object] = []

if __name__ == "__main__":
    main()
