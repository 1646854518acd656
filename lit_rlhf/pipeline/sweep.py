"""Sweeps: one row per job, one plot, whatever happened to single jobs."""

from __future__ import annotations

import csv
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from lit_rlhf.apps.run_reader import numbers
from lit_rlhf.apps.sweep_reader import Job, load_jobs, varied
from lit_rlhf.errors import NoFigure, UserError
from lit_rlhf.files import make_folder, write_json, written_anew
from lit_rlhf.pipeline.failures import sweep_begins
from lit_rlhf.stages.stage import all_stages

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def objective_address(cfg: DictConfig, names: list[str]) -> str:
    """Address in ``summary.json`` of the figure that a sweeper optimizes: the one that is asked for, or the last
    stage's own."""
    known = all_stages()
    aligning = [name for name, stage in known.items() if stage.aligns]
    trained = next((name for name in names if name in aligning), aligning[0])
    return cfg.objective or f"{names[-1]}.{known[names[-1]].objective.format(policy=trained)}"


def objective_of(cfg: DictConfig, summary: dict[str, Any], names: list[str]) -> tuple[str, float]:
    """(address, value) of the figure that a sweeper optimizes. Raises ``NoFigure`` where there is no such one,
    ``UserError`` where it is no number."""
    address = objective_address(cfg, names)
    node: Any = summary
    for part in address.split("."):
        there = isinstance(node, dict) and part in node
        node = node[part] if there else None
    if not isinstance(node, int | float):
        if cfg.objective is None:
            return address, math.nan
        kind = UserError if there and node is None else NoFigure  # which may be a number in other jobs
        raise kind(
            f"objective={address}: there is no such number in summary.json; it has {', '.join(numbers(summary))}"
        )
    return address, float(node)


def write_job(folder: Path, overrides: list[str], record: dict[str, Any]) -> None:
    """``job.json``: how a job of a sweep ended."""
    write_json(make_folder(folder) / "job.json", {"overrides": overrides, **record})


class SweepTable(Callback):
    """Writes ``sweep.csv`` and ``sweep.png`` above the jobs' folders, and prints the table.

    Args:
        page: writes a page about the sweep, given its folder, and returns where; None: there is none.
    """

    def __init__(self, page: Callable[[Path], Path] | None = None) -> None:
        self.page = page

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        sweep_begins(config.hydra.sweep.dir)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:
        folder = Path(config.hydra.sweep.dir)
        jobs = load_jobs(folder)
        if not jobs:
            return
        write_table(jobs, folder / "sweep.csv")
        print("\n" + text_table(jobs))
        plot(jobs, folder / "sweep.png")
        print(f"sweep: {folder / 'sweep.csv'}, {folder / 'sweep.png'}")
        if self.page is not None and any(job.done for job in jobs):
            print(f"page: {self.page(folder)}")
        if failed := [job for job in jobs if job.status not in ("done", "pruned")]:
            for job in failed:
                print(f"job {job.name} ({' '.join(job.record['overrides'])}) failed: {job.error}")
            sys.exit(1)


def write_table(jobs: list[Job], path: Path) -> None:
    """One row per job: its overrides, its headline figures."""
    parts = {"by_kind", "interval"}
    figures = dict.fromkeys(name for job in jobs for name in job.figures if parts.isdisjoint(name.split(".")))
    settings = dict.fromkeys(name for job in jobs for name in job.settings)
    with written_anew(path) as file:
        columns = ["job", "status", *settings, *(f for f in figures if f not in settings), "error"]
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for job in jobs:
            known = {"job": job.name, "status": job.status, "error": job.error}
            shown = {name: value for name, value in job.figures.items() if name in figures}
            writer.writerow({**shown, **job.settings, **known})


def text_table(jobs: list[Job]) -> str:
    """Table of a sweep for the terminal: settings that differ, and figures; below it the means over seeds or folds."""
    objective = next((job.objective[0] for job in jobs if job.done), "objective")
    known = {name for job in jobs for name in job.figures} - {objective}
    shown = [f"{name}.{figure}" for name, stage in reversed(all_stages().items()) for figure in stage.in_sweeps]
    settings, figures = varied(jobs), [objective, *(name for name in shown if name in known)]
    lines = [["job", "status", *settings, *figures, "seconds"]]
    for job in jobs:
        asked = [_short(job.settings.get(name, "")) for name in settings]
        lines.append([job.name, job.status, *asked, *(_mean([job], name) for name in [*figures, "seconds.total"])])
    for group in by_settings(jobs).values():
        if len(group) > 1:
            asked = ["" if _repeats(name) else _short(group[0].settings.get(name, "")) for name in settings]
            means = [_mean(group, name) for name in [*figures, "seconds.total"]]
            lines.append(["mean", f"of {len(group)}", *asked, *means])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)


def plot(jobs: list[Job], path: Path) -> None:
    """The objective by what was tried; each setting apart where there is no room for all labels beside each other."""
    from matplotlib.figure import Figure

    tried = by_settings(jobs)
    if len("".join(tried)) > 150:
        names = [name for name in varied(jobs) if not _repeats(name)]
        figure = Figure(figsize=(4.0 * len(names) + 1, 4), layout="constrained")
        for name, axes in zip(names, figure.subplots(1, len(names), squeeze=False)[0]):
            _plot_setting(axes, name, [job for job in jobs if math.isfinite(job.objective[1])])
    else:
        figure = Figure(figsize=(max(5.0, 1.2 * len(tried) + 2), 4), layout="constrained")
        _plot_groups(figure.subplots(), jobs, tried)
    figure.axes[0].set_ylabel(next((job.objective[0] for job in jobs if job.done), "objective"))
    for axes in figure.axes:
        axes.grid(axis="y", alpha=0.3)
    with written_anew(path, "wb") as file:
        figure.savefig(file, dpi=150)


def _plot_groups(axes: Axes, jobs: list[Job], tried: dict[str, list[Job]]) -> None:
    """A dot per job, their mean, and their standard deviation over seeds or folds; a dot per seed where it is all that
    differs, with the mean and the standard deviation across."""
    names = [name for name in varied(jobs) if not _repeats(name)]
    groups = {label: [job.objective[1] for job in group] for label, group in tried.items()}
    if not names and len(groups.get("all", [])) > 1:
        middle, spread = mean(groups["all"]), stdev(groups["all"])
        axes.axhspan(middle - spread, middle + spread, color="#1f4e9c", alpha=0.12)
        axes.axhline(middle, color="#1f4e9c")
        names = varied(jobs)
        groups = {", ".join(job.settings.get(n, "") for n in names): [job.objective[1]] for job in tried["all"]}
    for x, values in enumerate(groups.values()):
        axes.plot([x] * len(values), values, "o", color="#7a8ba8", alpha=0.6, zorder=2)
        if len(values) > 1:
            axes.errorbar(x, mean(values), yerr=stdev(values), fmt="D", color="#1f4e9c", capsize=5, zorder=3)
    axes.set_xticks(range(len(groups)), groups, rotation=30 if len(groups) > 6 else 0)
    axes.set_xlabel(", ".join(names))
    axes.set_title("mean and standard deviation; a dot is a job", fontsize=10)
    axes.set_xlim(-0.5, max(len(groups), 1) - 0.5)


def _plot_setting(axes: Axes, name: str, jobs: list[Job]) -> None:
    """A dot per job at its value of one setting."""
    values = [job.settings.get(name, "default") for job in jobs]
    try:
        numeric = [float(value) for value in values]
    except ValueError:
        axes.plot(values, [job.objective[1] for job in jobs], "o", color="#1f4e9c", alpha=0.7)
    else:
        axes.plot(numeric, [job.objective[1] for job in jobs], "o", color="#1f4e9c", alpha=0.7)
        if min(numeric) > 0 and max(numeric) / min(numeric) > 8:
            axes.set_xscale("log")
    axes.set_xlabel(name)


def by_settings(jobs: list[Job]) -> dict[str, list[Job]]:
    """The jobs that came to a figure, by what they were to try; those of one entry differ in seed or fold alone."""
    names = [n for n in varied(jobs) if not _repeats(n)]
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        if math.isfinite(job.objective[1]):
            groups.setdefault(", ".join(job.settings.get(n, "default") for n in names) or "all", []).append(job)
    return groups


def _short(value: str) -> str:
    """A value as the table shows it: four digits of a number that has many."""
    return f"{float(value):.4g}" if re.fullmatch(r"-?\d*\.\d{5,}(e-?\d+)?", value) else value


def _repeats(setting: str) -> bool:
    """Whether another value of it makes the same experiment once more."""
    return setting == "seed" or setting.endswith(".fold")


def _mean(jobs: list[Job], name: str) -> str:
    """The mean of a figure over those jobs that have it, as a cell of the table."""
    figures = [{**job.figures, job.objective[0]: job.objective[1]}.get(name, math.nan) for job in jobs]
    known = [figure for figure in figures if math.isfinite(figure)]
    return f"{mean(known):.4g}" if known else ""
