"""What all benchmarks share: two sides in turns, whether their work was equal, medians and ratios, tables and plots.

A benchmark names its cases and measures one of them with :func:`interleave`; :func:`main` does the rest: the command
line, ``results/<work>.json``, ``results/<work>.svg`` and the table on the terminal."""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import platform
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from lit_rlhf.models.kernels import keep_freed_memory

RESULTS = Path(__file__).resolve().parent / "results"
OURS = "lit_rlhf"
ALONE = 0.95  # of the processor's time, in the time that went by: nothing else of weight ran on the core
PACKAGES = ("lit-rlhf", "torch", "transformers", "lightning", "trl", "accelerate", "numpy")


@dataclass(frozen=True)
class Lap:
    """One unit of work of a side: a rollout, an optimizer step, an iteration."""

    seconds: float
    cpu_seconds: float  # of all threads; less than ``seconds`` where another program had the core
    amount: float  # of what the rate counts: tokens, comparisons, answers
    optimizer_steps: int
    watched: dict[str, float]  # what tells whether the work was equal


class WorkDiffersError(Exception):
    """The sides did not do the same; their times must not be compared."""


@dataclass(frozen=True)
class Check:
    """A quantity that must be alike on both sides."""

    what: str
    ours: float
    theirs: float
    tolerance: float = 0.0  # relative to theirs

    @property
    def passed(self) -> bool:
        return abs(self.ours - self.theirs) <= self.tolerance * abs(self.theirs)


def check_equal(checks: Sequence[Check]) -> None:
    """Raises :class:`WorkDiffersError` that names the quantities that are not alike."""
    failed = [c for c in checks if not c.passed]
    if failed:
        lines = (f"{c.what}: {c.ours:.6g} here, {c.theirs:.6g} there (within {c.tolerance:.1%})" for c in failed)
        raise WorkDiffersError("the sides did not do equal work. " + "; ".join(lines))


def alike(laps: Laps, **tolerances: float) -> list[Check]:
    """Checks of optimizer steps, amounts and watched quantities over all laps: exact unless ``tolerances`` says."""
    ours, theirs = laps.values()
    checks = [
        Check("laps", len(ours), len(theirs)),
        Check("optimizer steps", *(sum(lap.optimizer_steps for lap in side) for side in (ours, theirs))),
        Check("amount of work", *(sum(x.amount for x in side) for side in (ours, theirs)), tolerances.get("amount", 0)),
    ]
    for name in ours[0].watched:
        means = (sum(lap.watched[name] for lap in side) / len(side) for side in (ours, theirs))
        checks.append(Check(f"mean {name}", *means, tolerances.get(name, 0)))
    return checks


# -------------------------------------------------------------------------------------------------- in turns

Laps = dict[str, list[Lap]]
Clock = tuple[float, float]  # seconds that have gone by, and those of the processor
EndLap = Callable[..., None]  # end_lap(amount, since=when the part of the lap that counts began, **watched)
Side = Callable[[EndLap], Any]  # works on and on, and calls its argument after each unit


def clock() -> Clock:
    """Now."""
    return time.perf_counter(), time.process_time()


class _Turn:
    """A side in a process of its own, of which only one works at a time: trainers cannot be left and entered again.

    In one process each side would have a pool of threads of its own, together more than there are cores; OpenMP then
    puts threads to sleep between any two operations, which costs small ones more than the second core gives."""

    def __init__(self, name: str, side: Side, threads: int) -> None:
        self.name, self.laps = name, []
        self._pipe, far_end = multiprocessing.Pipe()
        fork = multiprocessing.get_context("fork")  # sides need not be pickled
        self._process = fork.Process(target=_take_turns, args=(far_end, side, threads), daemon=True)
        self._process.start()
        far_end.close()  # so that the end of the process is the end of the pipe

    def go(self) -> None:
        """Lets the side work for one lap."""
        lap = self._ask(True)
        if lap is None:
            raise RuntimeError(f"{self.name} has ended before its last lap")
        self.laps.append(lap)

    def finish(self) -> None:
        """Lets it come to its end, unwatched."""
        self._ask(False)
        self._process.join()

    def stop(self) -> None:
        """Ends it wherever it is."""
        self._process.kill()  # a trainer only takes note of a request
        self._process.join()

    def _ask(self, go_on: bool) -> Lap | None:
        try:
            self._pipe.send(go_on)
            answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            raise RuntimeError(f"the process of {self.name} ended with {self._process.exitcode}") from None
        if isinstance(answer, BaseException):
            raise answer
        return answer


def _take_turns(pipe: Connection, side: Side, threads: int) -> None:
    """The other end: work when asked to, and answer with laps, with an error, or with None at the side's end."""
    torch.set_num_threads(threads)
    parent = os.getppid()

    def asked() -> bool:
        while not pipe.poll(1):
            if os.getppid() != parent:  # killed; its end of the pipe is open in the other side, too
                os._exit(1)
        return pipe.recv()

    watched = asked()
    optimizer_steps, begun = 0, clock()

    def count(*_: Any) -> None:
        nonlocal optimizer_steps
        optimizer_steps += 1

    def end_lap(amount: float, since: Clock | None = None, **watching: float) -> None:
        nonlocal optimizer_steps, begun, watched
        seconds, cpu_seconds = (now - then for now, then in zip(clock(), since or begun))
        if not watched:
            return
        pipe.send(Lap(seconds, cpu_seconds, amount, optimizer_steps, watching))
        watched = asked()
        optimizer_steps, begun = 0, clock()

    register_optimizer_step_post_hook(count)
    try:
        side(end_lap)
        pipe.send(None)
    except BaseException as error:
        error.add_note(traceback.format_exc())
        pipe.send(error)


def interleave(sides: dict[str, Side], laps: int, warmup: int = 1, threads: int = 1) -> Laps:
    """Laps of all sides, which take turns; whatever else the machine does falls on all alike.

    A side must have ``laps + warmup`` units of work. The first ``warmup`` of them, the first one with all its set-up,
    are dropped. The order changes from turn to turn."""
    turns = {name: _Turn(name, side, threads) for name, side in sides.items()}
    try:
        for number in range(warmup + laps):
            for turn in list(turns.values())[:: 1 if number % 2 else -1]:
                turn.go()
        for turn in turns.values():
            turn.finish()
    finally:
        for turn in turns.values():
            turn.stop()
    return {name: turn.laps[warmup : warmup + laps] for name, turn in turns.items()}


# ---------------------------------------------------------------------------------------------------- results


@dataclass(frozen=True)
class Rate:
    """Amount of work a second, over the laps of one side."""

    median: float
    lowest: float
    highest: float
    laps: int

    @classmethod
    def of(cls, laps: Sequence[Lap]) -> Rate:
        rates = [lap.amount / lap.seconds for lap in laps]
        return cls(median(rates), min(rates), max(rates), len(rates))


@dataclass(frozen=True)
class Result:
    """One case, measured."""

    work: str
    case: str
    threads: int
    unit: str  # of the rates
    sides: dict[str, Rate]  # this package first
    ratio: float  # of the medians: how many times as fast this package is
    ratio_range: tuple[float, float]  # of the ratios of each turn
    cpu_ratio: float  # the ratio in processor time: differs where something else ran on the same cores
    processor_share: float  # of the seconds of all laps; below 1 for each thread where something else ran, too
    settings: dict[str, Any]
    equal_work: list[Check]
    command: str = ""
    date: str = ""
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def peer(self) -> str:
        return list(self.sides)[1]


def result(work: Work, case: str, threads: int, laps: Laps, checks: Sequence[Check]) -> Result:
    """Medians and ratios of ``laps``; raises :class:`WorkDiffersError` where a check fails."""
    check_equal(checks)
    sides = {name: Rate.of(side) for name, side in laps.items()}
    ours, theirs = sides.values()
    mine, its = laps.values()
    turns = [(a.amount / a.seconds) / (b.amount / b.seconds) for a, b in zip(mine, its)]
    return Result(
        work.name,
        case,
        threads,
        work.unit,
        sides,
        ours.median / theirs.median,
        (min(turns), max(turns)),
        median(x.amount / x.cpu_seconds for x in mine) / median(x.amount / x.cpu_seconds for x in its),
        sum(x.cpu_seconds for x in mine + its) / sum(x.seconds for x in mine + its) / threads,
        asdict(replace(work.cases[case], laps=len(mine))),
        list(checks),
        command=command(work.name, case, threads),
        date=time.strftime("%Y-%m-%d"),
        machine=machine(),
        versions=versions(),
    )


def command(work: str, case: str, threads: int) -> str:
    """What measures one case again."""
    name, growth = (work.removesuffix("_growth"), " --growth") if work.endswith("_growth") else (work, "")
    return f"python benchmarks/{name}.py{growth} --cases '{case}' --threads {threads}"


def machine() -> dict[str, Any]:
    """What it ran on."""
    processor, memory = platform.processor(), 0
    if Path("/proc/cpuinfo").is_file():
        names = [
            x.split(":", 1)[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x
        ]
        processor = names[0] if names else processor
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": processor,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "cores used": usable,
        "memory GiB": round(memory / 2**30),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Of Python and of the packages that are there."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def store(results: Sequence[Result], order: Sequence[str], folder: Path = RESULTS) -> Path:
    """``<folder>/<work>.json``: these results, and of the others those that are there and were not measured anew.

    ``order`` is that of the cases; a case that it does not have is dropped."""
    path = folder / f"{results[0].work}.json"
    known = {(r.case, r.threads): r for r in [*load(path), *results] if r.case in order}
    folder.mkdir(parents=True, exist_ok=True)
    rows = [asdict(r) for r in sorted(known.values(), key=lambda r: (r.threads, order.index(r.case)))]
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return path


def load(path: Path) -> list[Result]:
    """The results of a file; none where there is no such file."""
    rows = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return [
        Result(
            **row
            | {
                "sides": {name: Rate(**rate) for name, rate in row["sides"].items()},
                "ratio_range": tuple(row["ratio_range"]),
                "equal_work": [Check(**check) for check in row["equal_work"]],
            }
        )
        for row in rows
    ]


def table(results: Sequence[Result]) -> str:
    """Markdown, a row a result."""
    lines = [
        "| case | threads | lit_rlhf, median (range) | peer, median (range) | unit | ratio (range over turns) "
        "| by processor time |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in results:
        ours, theirs = r.sides.values()
        ratio = f"**{r.ratio:.2f}** ({r.ratio_range[0]:.2f}-{r.ratio_range[1]:.2f})"
        cells = (r.case, r.threads, shown(ours), f"{r.peer} {shown(theirs)}", r.unit, ratio, f"{r.cpu_ratio:.2f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def shown(rate: Rate) -> str:
    """Median and range, three digits or more."""
    median, lowest, highest = (
        f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in (rate.median, rate.lowest, rate.highest)
    )
    return f"{median} ({lowest}-{highest})"


def plot(results: Sequence[Result], path: Path) -> None:
    """Ratio of each case with its range over turns; a dotted line where both sides are equally fast."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 0.6 + 0.36 * len(results)), layout="constrained")
    for row, r in enumerate(results):
        colour = "#1b6ca8" if r.threads == 1 else "#d95f02"
        axis.plot(r.ratio_range, (row, row), color=colour, alpha=0.35, linewidth=5, solid_capstyle="butt")
        axis.plot(r.ratio, row, "o", color=colour)
        axis.annotate(f"{r.ratio:.2f}", (r.ratio, row), (0, 6), textcoords="offset points", ha="center", fontsize=8)
    names = [f"{r.case}, {r.threads} thread{'s' * (r.threads > 1)}" for r in results]
    axis.set(yticks=range(len(results)), yticklabels=names, xlim=(0, None), ylim=(len(results) - 0.4, -0.7))
    axis.set_xlabel(f"times as fast as {results[0].peer}: {results[0].unit}")
    axis.axvline(1, color="grey", linestyle=":", linewidth=1)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write a figure, the same file for the same figure."""
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = path.stem
    figure.gca().spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


# ------------------------------------------------------------------------------------------------ the command


@dataclass(frozen=True)
class Work:
    """One benchmark.

    ``measure(case, threads, laps)`` gives the laps of both sides, this package first, and the checks."""

    name: str
    unit: str
    cases: dict[str, Any]  # dataclasses with a field ``laps``
    measure: Callable[[Any, int, int], tuple[Laps, list[Check]]]
    slow: tuple[str, ...] = ()  # cases that take so long that they must be named
    growth: dict[str, Any] = field(default_factory=dict)  # cases "<setting> <value>": how it grows with each


def vary(case: Any, laps: int, **axes: Sequence[Any]) -> dict[str, Any]:
    """``case`` with one setting changed at a time, by "<setting> <value>"."""
    return {
        f"{name} {value}": replace(case, laps=laps, **{name: value})
        for name, values in axes.items()
        for value in values
    }


def plot_growth(results: Sequence[Result], path: Path) -> None:
    """Rates of both sides over each setting that was varied."""
    from matplotlib import pyplot

    results = [r for r in results if r.threads == results[0].threads]
    axes = {r.case.rsplit(" ", 1)[0]: None for r in results}
    figure, panels = pyplot.subplots(1, len(axes), figsize=(3.2 * len(axes), 3), layout="constrained", squeeze=False)
    for panel, name in zip(panels[0], axes):
        rows = [r for r in results if r.case.rsplit(" ", 1)[0] == name]
        values = [r.case.rsplit(" ", 1)[1] for r in rows]
        for side, colour in zip(rows[0].sides, ("#1b6ca8", "#d95f02")):
            panel.plot(values, [r.sides[side].median for r in rows], "o-", color=colour, label=side)
        for i, r in enumerate(rows):
            height = max(rate.median for rate in r.sides.values())
            panel.annotate(f"{r.ratio:.2f}x", (i, height), (0, 6), textcoords="offset points", ha="center", fontsize=8)
        panel.set_xlabel(name.replace("_", " "))
        panel.margins(0.15, 0.2)
        panel.set_ylim(bottom=0)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel(results[0].unit)
    panels[0][0].legend(frameon=False, fontsize=8)
    save(figure, path)


def main(work: Work, description: str | None) -> None:
    """Parse the arguments, measure, and write what was found."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=[*work.cases, *work.growth], metavar="CASE",
                        help=f"of: {', '.join(work.cases)}")  # fmt: skip
    parser.add_argument("--growth", action="store_true", help="how it grows with batch, length and size of the model")
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--laps", type=int, help="turns that are measured, in place of each case's own number")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file and the plot")
    arguments = parser.parse_args()
    if arguments.growth:
        work = replace(work, name=f"{work.name}_growth", cases=work.growth, slow=())
    quiet()
    keep_freed_memory()  # as the command does; both sides gain
    torch.set_num_threads(1)  # no threads here, which the processes of the sides could not take over
    found = []
    for threads in arguments.threads:
        for name in arguments.cases or [name for name in work.cases if name not in work.slow]:
            begun = time.perf_counter()
            try:
                laps, checks = work.measure(work.cases[name], threads, arguments.laps or work.cases[name].laps)
                found.append(result(work, name, threads, laps, checks))
                if threads == 1 and found[-1].processor_share < ALONE:
                    share = f"{found[-1].processor_share:.0%}"
                    print(f"{name}: other programs ran on the same core ({share} was left)", file=sys.stderr)
            except WorkDiffersError as error:
                sys.exit(f"{work.name}, {name}: {error}")
            print(f"{work.name}, {name}, {threads} threads: {time.perf_counter() - begun:.0f} s", file=sys.stderr)
            path = store(found, list(work.cases), arguments.out)  # after each: the others stand where one fails
    (plot_growth if arguments.growth else plot)(load(path), path.with_suffix(".svg"))
    print(table(found))


def quiet() -> None:
    """Keep the libraries' chatter off the terminal."""
    import matplotlib
    import transformers

    matplotlib.use("svg")
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "accelerate", "trl"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
