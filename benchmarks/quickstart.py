"""The whole quickstart against an older version of this package, the one before its speed was worked on.

    python benchmarks/quickstart.py [--before 4b16d82] [--threads 1 2] [--seeds 1 2 3]
    python benchmarks/quickstart.py --alone --threads 2 --seeds 11 12 13       # a table of this version's runs

Both commands run with the installed libraries, each from its own files (``git archive``), one working at a time: after
two seconds the one is stopped (SIGSTOP) and the other goes on (SIGCONT), and whichever has ended a stage waits for the
other. A stage counts the seconds in which its command was at work. What is learned must be alike, in the mean over the
seeds; its curves go to ``quickstart_curves.json`` and a plot. Of this version what is committed counts. Needs Linux and
git."""

from __future__ import annotations

import argparse
import csv
import ctypes
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
from functools import reduce
from operator import getitem
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
    alike,
    load,
    plot,
    quiet,
    result,
    save,
    store,
    table,
)

BEFORE = "4b16d82"
# What that one did by itself, so that both do equal work
AS_BEFORE = [
    "pretrain.optimizer.matrix_lr=null", "pretrain.optimizer.lr=4e-3", "pretrain.trainer.max_steps=820",
    "preference.data.prompts=4000", "reward/head=linear", "ppo.trainer.limit_train_batches=54",
]  # fmt: skip
SLICE = 2.0  # seconds
STAGES = ("pretrain", "sft", "preference", "reward", "ppo", "evaluate")
WHOLE = "the whole quickstart"
# What was learned, by its address in summary.json, and how far two versions may differ, as a share of the older one's:
# from seed to seed SFT's loss moves by a tenth, and PPO's win rate by a twentieth.
LEARNED = {
    ("pretrain", "val_loss"): 0.1,
    ("sft", "val_loss"): 0.15,
    ("reward", "gold_accuracy"): 0.05,
    ("evaluate", "win_rate", "ppo_vs_sft", "mean"): 0.1,
}
# Whose course is kept, by its name in metrics.csv
CURVES = {
    "pretrain": ("pretrain/loss",),
    "sft": ("sft/loss",),
    "reward": ("reward/loss", "reward/accuracy"),
    "ppo": ("ppo/gold", "ppo/kl"),
}
Curve = dict[str, list[float]]  # "step" and "value"
Curves = dict[str, dict[str, dict[str, Curve]]]  # run -> side -> name -> curve


@dataclass(frozen=True)
class Case:
    seeds: tuple[int, ...] = (1,)
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
                [sys.executable, *arguments], cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT,
                preexec_fn=_end_with_parent,
            )  # fmt: skip
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
        watched = {" ".join(address): float(reduce(getitem, address, learned)) for address in LEARNED}
        laps, last = {}, (0.0, 0.0)
        for stage in STAGES:
            seconds, cpu = (now - then for now, then in zip(self.ended[stage], last))
            laps[stage], last = Lap(seconds, cpu, 3600, 0, {}), self.ended[stage]
        return laps | {WHOLE: Lap(*self.ended[WHOLE], 3600, 0, watched)}

    def curves(self) -> dict[str, Curve]:
        """Of all stages that train, by the name of what was logged."""
        found = {}
        for stage, names in CURVES.items():
            with (self.run / stage / "metrics.csv").open(newline="") as file:
                rows = list(csv.DictReader(file))
            for name in names:
                logged = [row for row in rows if row.get(name)]
                found[name] = {k: [float(row[c]) for row in logged] for k, c in (("step", "step"), ("value", name))}
        return found

    def _cpu(self) -> float:
        try:
            fields = Path(f"/proc/{self._process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        except (OSError, IndexError):
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _end_with_parent() -> None:
    """Whoever ends this script, by whatever means: a command that stands still would do so for ever."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


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


def run(case: Case, threads: int, seed: int) -> tuple[dict[str, dict[str, Lap]], dict[str, dict[str, Curve]]]:
    """Laps and curves of both commands with one seed."""
    quickstart = ["-m", "lit_rlhf", f"threads={threads}", f"seed={seed}", "logger=csv", "callbacks.progress_bar=false"]
    with tempfile.TemporaryDirectory() as folder:
        commands: dict[str, Command] = {}
        try:
            sides = ((OURS, "HEAD", AS_BEFORE), (f"before ({case.before})", case.before, []))
            for name, revision, settings in sides:
                place = Path(folder) / revision
                unpack(revision, place)
                commands[name] = Command([*quickstart, *settings], place)
            in_turns(list(commands.values()), SLICE)
        finally:
            for command in commands.values():
                command.stop()
        return {n: c.laps() for n, c in commands.items()}, {n: c.curves() for n, c in commands.items()}


# Columns of the table of seeds: what each is called, and its address in summary.json
OUTCOMES = {
    "seconds": ("seconds", "total"),
    "gold, SFT": ("evaluate", "models", "sft", "gold"),
    "gold, PPO": ("evaluate", "models", "ppo", "gold"),
    "correct, SFT": ("evaluate", "models", "sft", "correct"),
    "correct, PPO": ("evaluate", "models", "ppo", "correct"),
    "KL, nats": ("evaluate", "models", "ppo", "kl"),
    "PPO wins against SFT": ("evaluate", "win_rate", "ppo_vs_sft", "mean"),
    "best of 8 wins": ("evaluate", "best_of_n", "win_rate", "best_of_n_vs_sft", "mean"),
}


def alone(settings: Sequence[str], seeds: Sequence[int], out: Path) -> str:
    """A table of what this version's quickstart reaches with each seed; ``quickstart_seeds.json`` has it, too."""
    found: dict[str, dict[str, float]] = {}
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "HEAD"
            unpack("HEAD", place)
            command = [sys.executable, "-m", "lit_rlhf", *settings, f"seed={seed}", "callbacks.progress_bar=false"]
            environment = {**os.environ, "PYTHONPATH": str(place)}
            subprocess.run(command, cwd=place, env=environment, check=True, stdout=subprocess.DEVNULL)
            reached = json.loads((place / "runs/quickstart/summary.json").read_text())
        found[str(seed)] = {name: float(reduce(getitem, address, reached)) for name, address in OUTCOMES.items()}
        (out / "quickstart_seeds.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return seeds_table(found)


def seeds_table(found: dict[str, dict[str, float]]) -> str:
    """Rows of seeds, and of their mean, as Markdown."""
    mean = {name: sum(row[name] for row in found.values()) / len(found) for name in OUTCOMES}
    rows = [["seed", *OUTCOMES], ["---"] * (1 + len(OUTCOMES))]
    for seed, values in {**found, "mean": mean}.items():
        rows.append([seed, *(f"{v:.0f}" if v > 10 else f"{v:.3f}" for v in values.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def compare(runs: Sequence[dict[str, dict[str, Lap]]]) -> dict[str, tuple[Laps, list[Check]]]:
    """Laps, one a seed, and checks, of each stage and of the whole."""
    sides = {name: {side: [found[side][name] for found in runs] for side in runs[0]} for name in (*STAGES, WHOLE)}
    allowed = {" ".join(address): share for address, share in LEARNED.items()}
    return {name: (laps, alike(laps, **allowed) if name == WHOLE else []) for name, laps in sides.items()}


def store_curves(found: dict[str, dict[str, Curve]], key: str, path: Path) -> Curves:
    """Those of one run, by ``key``, beside those of other runs that the file has."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    known = dict(sorted((known | {key: found}).items()))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(known) + "\n", encoding="utf-8")
    return known


def plot_curves(runs: Curves, path: Path) -> None:
    """A panel for each quantity, a line for each run of each version."""
    from matplotlib import pyplot

    names = [name for stage in CURVES.values() for name in stage]
    figure, panels = pyplot.subplots(1, len(names), figsize=(3 * len(names), 3), layout="constrained")
    for panel, name in zip(panels, names):
        for number, run in enumerate(runs.values()):
            for (side, curves), colour in zip(run.items(), ("#1b6ca8", "#d95f02")):
                curve, label = curves[name], side if number == 0 else None
                panel.plot(curve["step"], curve["value"], color=colour, alpha=0.7, linewidth=1, label=label)
        panel.set(xlabel="iteration" if name.startswith("ppo/") else "step", title=name)
        if name.endswith("/loss"):
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter("{x:g}")
            panel.yaxis.set_minor_formatter("{x:g}")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=8)
    save(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default=BEFORE, help="the older version, as git knows it")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="a run of both versions with each")
    parser.add_argument("--alone", action="store_true", help="a table of this version's seeds, without an older one")
    parser.add_argument("--set", nargs="*", default=[], metavar="SETTING", help="further settings, with --alone")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON files and the plots")
    given = parser.parse_args(arguments)
    if given.alone:
        return print(alone(["logger=csv", f"threads={given.threads[0]}", *given.set], given.seeds, given.out))
    quiet()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an end at which the files go, too
    names = {stage: f"quickstart's {stage}" for stage in STAGES} | {WHOLE: WHOLE}
    case = Case(tuple(given.seeds), given.before)
    work = Work("quickstart", "an hour", dict.fromkeys(names.values(), case), lambda *_: ({}, []))
    curves = given.out / "quickstart_curves.json"
    found: list[Result] = []
    for threads in given.threads:
        runs = []
        for seed in case.seeds:
            laps, learned = run(case, threads, seed)
            runs.append(laps)
            plot_curves(store_curves(learned, f"seed {seed}, threads {threads}", curves), curves.with_suffix(".svg"))
        try:
            measured = [result(work, names[name], threads, *parts) for name, parts in compare(runs).items()]
        except WorkDiffersError as error:
            sys.exit(f"quickstart: {error}")
        seeds = " ".join(map(str, case.seeds))
        again = f"python benchmarks/quickstart.py --before {case.before} --threads {threads} --seeds {seeds}"
        found += [replace(one, command=again) for one in measured]
        path = store(found, list(names.values()), given.out)
    plot(load(path), path.with_suffix(".svg"))
    print(table(found))


if __name__ == "__main__":
    main()
