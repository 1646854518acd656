"""Stages one after the other: what is finished is skipped, and what came out is summed up."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lit_rlhf.apps.report import write_report
from lit_rlhf.apps.report.screen import print_screen, print_warning
from lit_rlhf.apps.run_reader import newest, read_summary, round_folders
from lit_rlhf.errors import UserError
from lit_rlhf.files import NEW, write_json
from lit_rlhf.finished import read_done
from lit_rlhf.models.checkpoint import OLD
from lit_rlhf.pipeline.loggers import log_report
from lit_rlhf.pipeline.process_group import Processes, processes_of
from lit_rlhf.pipeline.run import run_stage
from lit_rlhf.pipeline.run_folder import check_inputs, check_records, checkpoint_of, read_settings, start_of
from lit_rlhf.pipeline.settings import stages_of
from lit_rlhf.pipeline.stage_folder import StageFolder
from lit_rlhf.processes import is_main_process
from lit_rlhf.stages.evaluate import STAGE as EVALUATE
from lit_rlhf.stages.stage import all_stages


def run_chain(cfg: DictConfig, processes: Processes) -> dict[str, Any]:
    """Run the stages that ``cfg.stage`` names; returns the run's summary, in all processes but the first an empty one.

    A stage that trains in several processes runs in all of them, another one in the first alone."""
    names, run, main = stages_of(cfg), Path(cfg.paths.run_dir), is_main_process()
    for name in processes.agreed(lambda: _unfinished(cfg, names)):
        if main and (found := start_of(cfg, name)) and found == checkpoint_of(cfg):
            print(f"{name}: starts from the checkpoint {found}")
        several = processes_of(cfg[name].trainer) > 1
        if main or several:
            run_stage(cfg, name, processes if several else Processes())
        if main:
            summary = write_summary(run)
            print(headline(name, summary[name], summary["seconds"][name]), flush=True)
            if warning := summary[name].get("warning"):
                print_warning(f"{name}: {warning}")
        processes.meet()
    if not main:
        return {}
    if not any(newest(run, f"{name}/done.json").is_file() for name in all_stages()):
        raise UserError(f"{run}: there is no finished stage to report on; run one first")
    summary = write_summary(run)
    report = write_report(run)
    if EVALUATE.name in names and run == Path(cfg.paths.runs) / cfg.run:  # jobs of a sweep have their own place
        print_screen(run)
    print(f"report: {report}", flush=True)
    log_report(cfg, report, summary)
    return summary


def _unfinished(cfg: DictConfig, names: list[str]) -> list[str]:
    """The stages that are to run; what they need is checked before the first one begins."""
    settle(cfg)
    check_inputs(cfg)
    check_records(cfg)
    finished = {name: StageFolder(cfg, name).check() for name in names}
    for name in names:
        if finished[name]:
            print(f"{name}: finished already, in {Path(cfg.paths.run_dir) / name}")
    return [name for name in names if not finished[name]]


def settle(cfg: DictConfig) -> None:
    """Tidy what a start that was killed has left beside the stages of this run, where nobody writes them now."""
    run = Path(cfg.paths.run_dir)
    for name in all_stages():
        if (run / f"{name}{OLD}").exists() or (run / f"{name}{NEW}" / "done.json").exists():
            folder = StageFolder(cfg, name)
            with suppress(UserError), folder.held():
                folder.settle()


def write_summary(run: Path) -> dict[str, Any]:
    """``summary.json``: the headline figures of all finished stages; the seed is the last one's.

    Of stages that were gone through in rounds it has the last round's, and ``rounds`` has each round's own."""
    done = {name: read_done(newest(run, name)) for name in all_stages()}
    records = {name: record for name, record in done.items() if record}
    rounds = [read_summary(folder) for folder in round_folders(run)]
    seconds = {name: record["seconds"] or 0.0 for name, record in records.items()}
    if rounds:
        each = [r.get("seconds", {}) for r in rounds]
        seconds |= {name: sum(s.get(name, 0.0) for s in each) for name in seconds if any(name in s for s in each)}
    summary = {
        "seed": [read_settings(newest(run, name)).get(name, {}).get("seed") for name in records][-1],
        "seconds": {**seconds, "total": sum(seconds.values())},
        "peak_mib": {name: record["memory"]["peak_mib"] for name, record in records.items() if record["memory"]},
        **{name: record["figures"] for name, record in records.items()},
        **({"rounds": rounds} if rounds else {}),
    }
    write_json(run / "summary.json", summary)
    return summary


def headline(name: str, figures: dict[str, Any], seconds: float) -> str:
    """One line that says how a stage went."""
    shown = {k: v for k, v in figures.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    text = ", ".join(f"{k} {v:,}" if isinstance(v, int) else f"{k} {v:.3g}" for k, v in list(shown.items())[:6])
    judge = figures.get("judge") or (figures.get("win_rate") or {}).get("judge")
    text += f", by {judge}" if judge else ""
    for versus, rate in win_rates(figures).items():
        text += f"{', ' if text else ''}{versus} {rate['mean']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]"
    return f"{name}: {text} ({seconds:.0f} s)"


def win_rates(figures: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The win rates among a stage's figures."""
    rate = figures.get("win_rate") or {}
    return {"win rate against where it began": rate} if "mean" in rate else rate
