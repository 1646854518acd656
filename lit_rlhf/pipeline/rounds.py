"""Rounds: the better policy makes the answers that are ranked next (InstructGPT, section 3.1; arXiv:2204.05862)."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lit_rlhf.apps.report import write_report
from lit_rlhf.errors import UserError
from lit_rlhf.pipeline.chain import run_chain, write_summary
from lit_rlhf.pipeline.folder import check_inputs, check_records
from lit_rlhf.pipeline.settings import stages_of

ROUND = ("preference", "reward", "ppo", "evaluate")  # what is gone through in each round


def run_rounds(cfg: DictConfig, overrides: list[str]) -> dict[str, Any]:
    """Run what comes before the rounds, then ``cfg.rounds`` rounds, each in ``rounds/<n>/``; returns the summary."""
    names = stages_of(cfg)
    each = [name for name in names if name in ROUND]
    if missing := [name for name in ROUND[:3] if name not in names]:
        raise UserError(
            f"rounds={cfg.rounds} goes through preference, reward and ppo again and again, and stage= leaves out "
            f"{' and '.join(missing)}; name them all, or set rounds=1"
        )
    run = Path(cfg.paths.run_dir)
    if own := [name for name in ROUND[1:3] if (run / name).is_dir()]:
        raise UserError(
            f"rounds={cfg.rounds}: {run / own[0]} was made without rounds, and what starts from this run would take it "
            f"for the newest; choose another run=, with from_run={cfg.run} to start from its SFT model"
        )
    check_inputs(cfg)
    check_records(cfg)
    if before := [name for name in names if name not in ROUND]:
        changes = {"stage": before, "rounds": 1}
        run_chain(changed(cfg, changes), [*overrides, *written(changes)])
    for number in range(1, cfg.rounds + 1):
        print(f"round {number} of {cfg.rounds}", flush=True)
        changes = {"stage": each, "rounds": 1, **round_settings(cfg, number)}
        run_chain(changed(cfg, changes), [*overrides, *written(changes)])
    summary = write_summary(run)
    print(f"all rounds: {write_report(run)}")
    return summary


def round_settings(cfg: DictConfig, number: int) -> dict[str, Any]:
    """Address -> value: what sets round ``number``, from 1 on, apart."""
    run = Path(cfg.paths.run_dir)
    folders = [run / "rounds" / str(n) for n in range(1, number + 1)]
    own_sft = (run / "sft" / "model").is_dir()
    learned_from = folders[-(cfg.between_rounds.rankings or number) :]
    changes: dict[str, Any] = {
        "paths.run_dir": str(folders[-1]),
        "from_run": os.path.relpath(run, cfg.paths.runs) if own_sft else cfg.from_run,
        "preference.module.round": number,
        "reward.data.path": [str(folder / "data" / f"rankings-{folder.name}.jsonl") for folder in learned_from],
    }
    # Other prompts and other draws than in the rounds before.
    changes |= {f"{stage}.seed": cfg[stage].seed + number - 1 for stage in ROUND[:3]}
    if number > 1:
        last = str(folders[-2] / "ppo" / "model")
        changes["preference.policy.path"] = last
        if cfg.between_rounds.policy == "last":
            changes["ppo.policy.path"] = last
        loader = cfg.evaluate.policies.sft._target_
        earlier = {f"round_{f.name}": {"_target_": loader, "path": str(f / "ppo" / "model")} for f in folders[:-1]}
        changes |= {f"evaluate.policies.{name}": node for name, node in earlier.items()}
    return changes


def changed(cfg: DictConfig, changes: dict[str, Any]) -> DictConfig:
    """A copy of the settings with some of them changed."""
    cfg = copy.deepcopy(cfg)
    for address, value in changes.items():
        OmegaConf.update(cfg, address, value, force_add=True)
    policies = OmegaConf.to_container(cfg.evaluate.policies)
    policies["ppo"] = policies.pop("ppo")  # this round's, behind those of the rounds before it
    OmegaConf.update(cfg, "evaluate.policies", policies, merge=False)
    return cfg


def written(changes: dict[str, Any]) -> list[str]:
    """The same on a command line: several processes of a stage are started by one."""
    return [f"++{address}={_written(value)}" for address, value in changes.items()]


def _written(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_written(v)}" for key, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_written, value)) + "]"
    return "'" + value.replace("'", "\\'") + "'" if isinstance(value, str) else str(value)
