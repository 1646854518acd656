"""The whole quickstart against an older version of this package, the one before its speed was worked on.

    python benchmarks/quickstart.py [--before 4b16d82] [--threads 1 2] [--seed 1]

Both commands run with the installed libraries, each from its own files (``git archive``), one working at a time: after
two seconds the one is stopped (SIGSTOP) and the other goes on (SIGCONT), and whichever has ended a stage waits for the
other. A stage counts the seconds in which its command was at work. What is learned must be alike. Of this version what
is committed counts. Needs Linux and git."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from harness import (
    OURS,
    RESULTS,
    Check,
    Lap,
    Laps,
    Result,
    Work,
    WorkDiffersError,
    load,
    plot,
    quiet,
    result,
    store,
    table,
)

BEFORE = "4b16d82"
SLICE = 2.0  # seconds
STAGES = ("pretrain", "sft", "preference", "reward", "ppo", "evaluate")
WHOLE = "the whole quickstart"
# What was learned, by its address in summary.json, and how far two runs may differ, as a share of the older one's: from
# seed to seed SFT's loss moves by a tenth, and PPO's win rate by a twentieth.
LEARNED = {("pretrain", "val_loss"): 0.1, ("sft", "val_loss"): 0.15, ("reward", "gold_accuracy"): 0.05}
WINS = 0.1


@dataclass(frozen=True)
class Case:
    seed: int = 1
    before: str = BEFORE
    laps: int = 1


class Command:
    """A quickstart that is let work and stopped again: Python with ``arguments``, in the folder of its files."""

    def __init__(self, arguments: Sequence[str], folder: Path) -> None:
        self.run = folder / "runs/quickstart"
        self._log = folder / "log.txt"
        environment = {**os.environ, "PYTHONPATH": str(folder)}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, *arguments], cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        self._process.send_signal(signal.SIGSTOP)
        self.worked = 0.0  # seconds
        self.ended: dict[str, tuple[float, float]] = {}  # stage -> (seconds at work until its end, of the processor)

    def work(self, seconds: float, until: str) -> None:
        """At most so long, and no further than the end of a stage."""
        self._process.send_signal(signal.SIGCONT)
        begun = last = time.perf_counter()
        cpu = self._cpu()
        while not self.ended.keys() & {until, WHOLE} and last - begun < seconds:
            time.sleep(0.02)
            cpu = self._cpu() or cpu  # nothing is left to ask once it has ended
            ended = self._process.poll() is not None
            last = time.perf_counter()
            for stage in STAGES:
                if stage not in self.ended and (self.run / stage / "done.json").is_file():
                    self.ended[stage] = self.worked + last - begun, cpu
            if ended:
                self.ended[WHOLE] = self.worked + last - begun, cpu
        self.worked += last - begun
        if WHOLE not in self.ended:
            self._process.send_signal(signal.SIGSTOP)
        elif self._process.returncode:
            raise RuntimeError(f"the command ended with {self._process.returncode}: {self._log.read_text()[-2000:]}")

    def stop(self) -> None:
        """Ends it wherever it is."""
        self._process.kill()
        self._process.wait()

    def laps(self) -> dict[str, Lap]:
        """One of each stage, and of the whole; a rate is so many an hour."""
        learned = json.loads((self.run / "summary.json").read_text())
        watched = {f"{stage}, {name}": float(learned[stage][name]) for stage, name in LEARNED}
        watched["PPO wins against SFT"] = float(learned["evaluate"]["win_rate"]["ppo_vs_sft"]["mean"])
        laps, last = {}, (0.0, 0.0)
        for stage in STAGES:
            seconds, cpu = (now - then for now, then in zip(self.ended[stage], last))
            laps[stage], last = Lap(seconds, cpu, 3600, 0, {}), self.ended[stage]
        return laps | {WHOLE: Lap(*self.ended[WHOLE], 3600, 0, watched)}

    def _cpu(self) -> float:
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        except (OSError, IndexError):
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def in_turns(commands: Sequence[Command], seconds: float) -> None:
    """Stage by stage, until all are done."""
    for stage in (*STAGES, WHOLE):
        while going := [c for c in commands if not c.ended.keys() & {stage, WHOLE}]:
            for command in going:
                command.work(seconds, stage)


def unpack(revision: str, folder: Path) -> None:
    """The files of a version, without those that it does not track."""
    folder.mkdir()
    packed = folder.with_suffix(".tar")
    subprocess.run(["git", "-C", Path(__file__).parent.parent, "archive", "-o", packed, revision], check=True)
    with tarfile.open(packed) as archive:
        archive.extractall(folder, filter="data")


def measure(case: Case, threads: int) -> dict[str, tuple[Laps, list[Check]]]:
    """Laps and checks of each stage and of the whole."""
    quickstart = ["-m", "lit_rlhf", f"threads={threads}", f"seed={case.seed}", "logger=csv"]
    with tempfile.TemporaryDirectory() as folder:
        commands: dict[str, Command] = {}
        try:
            for name, revision in ((OURS, "HEAD"), (f"before ({case.before})", case.before)):
                place = Path(folder) / revision
                unpack(revision, place)
                commands[name] = Command([*quickstart, "callbacks.progress_bar=false"], place)
            in_turns(list(commands.values()), SLICE)
        finally:
            for command in commands.values():
                command.stop()
        found = {name: command.laps() for name, command in commands.items()}
    sides = {name: {side: [laps[name]] for side, laps in found.items()} for name in (*STAGES, WHOLE)}
    ours, theirs = (side[0].watched for side in sides[WHOLE].values())
    allowed = [*LEARNED.values(), WINS]
    checks = [Check(name, ours[name], theirs[name], allow) for name, allow in zip(ours, allowed, strict=True)]
    return {name: (laps, checks if name == WHOLE else []) for name, laps in sides.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default=BEFORE, help="the older version, as git knows it")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file and the plot")
    given = parser.parse_args(arguments)
    quiet()
    names = {stage: f"quickstart's {stage}" for stage in STAGES} | {WHOLE: WHOLE}
    case = Case(given.seed, given.before)
    work = Work("quickstart", "an hour", dict.fromkeys(names.values(), case), lambda *_: ({}, []))
    found: list[Result] = []
    for threads in given.threads:
        try:
            measured = [result(work, names[name], threads, *parts) for name, parts in measure(case, threads).items()]
        except WorkDiffersError as error:
            sys.exit(f"quickstart: {error}")
        again = f"python benchmarks/quickstart.py --before {case.before} --threads {threads} --seed {case.seed}"
        found += [replace(one, command=again) for one in measured]
        path = store(found, list(names.values()), given.out)
    plot(load(path), path.with_suffix(".svg"))
    print(table(found))


if __name__ == "__main__":
    main()
