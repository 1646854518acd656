"""Rounds: the better policy makes the answers that are ranked next (InstructGPT, section 3.1; arXiv:2204.05862)."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lit_rlhf.apps.report import write_report
from lit_rlhf.errors import UserError, say
from lit_rlhf.pipeline.process_group import Processes
from lit_rlhf.pipeline.run_folder import check_inputs, check_records, collecting_stage
from lit_rlhf.pipeline.runner import run_chain, write_summary
from lit_rlhf.pipeline.settings import stages_of
from lit_rlhf.processes import is_main_process
from lit_rlhf.stages.stage import all_stages


def run_rounds(cfg: DictConfig, processes: Processes) -> dict[str, Any]:
    """Run what comes before the rounds, then ``cfg.rounds`` rounds, each in ``rounds/<n>/``; returns the summary."""
    names = stages_of(cfg)
    each = [name for name in names if all_stages()[name].per_round is not None]
    required = making(cfg)
    if missing := [name for name in required if name not in names]:
        raise UserError(
            f"rounds={cfg.rounds} goes through {', '.join(required[:-1])} and {required[-1]} again and again, and "
            f"stage= leaves out {' and '.join(missing)}; name them all, or set rounds=1"
        )
    run = Path(cfg.paths.run_dir)
    if own := [name for name in required if name != collecting_stage() and (run / name).is_dir()]:
        raise UserError(
            f"rounds={cfg.rounds}: {run / own[0]} was made without rounds, and what starts from this run would take it "
            f"for the newest; choose another run=, with from_run={cfg.run} to start from its SFT model"
        )
    if is_main_process():
        check_inputs(cfg)
        check_records(cfg)
    if before := [name for name in names if name not in each]:
        run_chain(changed(cfg, {"stage": before, "rounds": 1}), processes)
    for number in range(1, cfg.rounds + 1):
        say(f"round {number} of {cfg.rounds}")
        run_chain(changed(cfg, {"stage": each, "rounds": 1, **round_settings(cfg, number)}), processes)
    if not is_main_process():
        return {}
    summary = write_summary(run)
    print(f"all rounds: {write_report(run)}")
    return summary


def making(cfg: DictConfig) -> list[str]:
    """The stages of a round that make something for the next: all but those that only test."""
    return [name for name, stage in all_stages().items() if stage.per_round is not None and cfg[name].run != "test"]


def round_settings(cfg: DictConfig, number: int) -> dict[str, Any]:
    """Settings of round ``number`` (from 1), address -> value."""
    run, known, collecting = Path(cfg.paths.run_dir), all_stages(), collecting_stage()
    folders = [run / "rounds" / str(n) for n in range(1, number + 1)]
    begun = (run / str(known[collecting].models[known[collecting].trained]) / "model").is_dir()
    learned_from = folders[-(cfg.between_rounds.rankings or number) :]
    changes: dict[str, Any] = {
        "paths.run_dir": str(folders[-1]),
        "from_run": os.path.relpath(run, cfg.paths.runs) if begun else cfg.from_run,
        f"{collecting}.module.round": number,
    }
    rankings = [str(folder / "data" / f"rankings-{folder.name}.jsonl") for folder in learned_from]
    changes |= {f"{name}.data.path": rankings for name in making(cfg) if known[name].data_from == collecting}
    # Other prompts and other draws than in the rounds before.
    changes |= {f"{name}.seed": cfg[name].seed + number - 1 for name in making(cfg)}
    if number > 1:
        aligning = _aligning(cfg)
        last = str(folders[-2] / aligning / "model")
        changes[f"{collecting}.{known[collecting].trained}.path"] = last
        if cfg.between_rounds.policy == "last":
            changes[f"{aligning}.{known[aligning].trained}.path"] = last
        for name, policies in _compared(cfg).items():
            loader = policies[known[aligning].called]._target_
            earlier = {
                f"round_{f.name}": {"_target_": loader, "path": str(f / aligning / "model")} for f in folders[:-1]
            }
            changes |= {f"{name}.policies.{model}": node for model, node in earlier.items()}
    return changes


def _aligning(cfg: DictConfig) -> str:
    """The stage whose policy writes the next round's answers."""
    return next(name for name in making(cfg) if all_stages()[name].aligns)


def _compared(cfg: DictConfig) -> dict[str, DictConfig]:
    """The models of each stage of a round that compares several."""
    names = [name for name, stage in all_stages().items() if stage.per_round is not None and "policies" in cfg[name]]
    return {name: cfg[name].policies for name in names}


def changed(cfg: DictConfig, changes: dict[str, Any]) -> DictConfig:
    """A copy of the settings with some of them changed."""
    cfg = copy.deepcopy(cfg)
    for address, value in changes.items():
        OmegaConf.update(cfg, address, value, force_add=True)
    for name, models in _compared(cfg).items():
        policies = OmegaConf.to_container(models)
        called = all_stages()[_aligning(cfg)].called
        policies[called] = policies.pop(called)  # this round's, behind those of the rounds before it
        OmegaConf.update(cfg, f"{name}.policies", policies, merge=False)
    return cfg
