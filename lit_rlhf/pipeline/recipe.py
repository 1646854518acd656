"""Which recipe of settings fits: that of models made from scratch, or that of a checkpoint.

A recipe is a file of ``conf/recipe``. The one of checkpoints is taken by itself where a stage starts from weights that
this package did not make, or that came from such."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lit_rlhf.pipeline.run_folder import lineage, origin_of, origin_of_stage
from lit_rlhf.pipeline.settings import check_top_level, compose_settings, planned_stages, stages_of
from lit_rlhf.stages.stage import all_stages

CHECKPOINT = "recipe=checkpoint"


def fitted_settings(overrides: list[str], with_hydra: bool = False) -> DictConfig:
    """Composed settings, with the checkpoint's recipe where that fits and no other one is asked for."""
    cfg = compose_settings(overrides, with_hydra=with_hydra)
    check_top_level(cfg)  # a mistake there is found before a run is looked at, which takes importing torch
    return compose_settings([*overrides, CHECKPOINT], with_hydra=with_hydra) if unfitted(cfg, overrides) else cfg


def unfitted(cfg: DictConfig, overrides: list[str]) -> bool:
    """Whether these settings are for models made from scratch, unasked, and weights are given."""
    asked = any(override.startswith("recipe=") for override in overrides)
    return not asked and cfg.recipe == "scratch" and weights_given(cfg) is not None


def weights_given(cfg: DictConfig) -> str | None:
    """Where the weights that a stage starts from come from, as a phrase; None where all are made from scratch."""
    if OmegaConf.is_missing(cfg.model, "path") or cfg.model.path is not None:
        return "model.path gives weights"
    for stage in planned_stages(cfg) if cfg.stage == "plan" else stages_of(cfg):
        path = _start(cfg, stage)
        if path is None:  # it makes its own, as recipe=scratch has it, or answers with those of a run
            begun = [] if all_stages()[stage].replaced_by_checkpoint else lineage(cfg)
            if from_checkpoint := next((run for run in begun if origin_of(run).recipe == "checkpoint"), None):
                return f"{from_checkpoint} came from a checkpoint"
            continue
        if not path.resolve().is_relative_to(Path(cfg.paths.runs).resolve()):
            return f"{path} gives weights"
        if origin_of_stage(path.parent).recipe == "checkpoint":
            return f"{path} came from a checkpoint"
    return None


def _start(cfg: DictConfig, stage: str) -> Path | None:
    """The model that a stage trains, or answers with; None where it makes one, or where that is not known yet."""
    try:
        path = OmegaConf.select(cfg, f"{stage}.{all_stages()[stage].trained}.path")
    except OmegaConfBaseException:  # what is not given is said later
        return None
    return Path(path) if isinstance(path, str) else None


def recipe_line(cfg: DictConfig) -> str:
    """One line that says which recipe is used, and why."""
    given = weights_given(cfg)
    if cfg.recipe == "checkpoint":
        return f"recipe: checkpoint ({given or 'as asked'}); the rates of models made from scratch: recipe=scratch"
    if given:
        return f"recipe: {cfg.recipe} (as asked, though {given})"
    begun = next((run for run in lineage(cfg) if origin_of(run).checkpoint), None)
    why = "weights are made from scratch" if begun is None else f"as {begun} has it, though it began with a checkpoint"
    return f"recipe: {cfg.recipe} ({why})"
