"""Loggers of a stage: ``metrics.csv``, and the loggers that ``logger`` chooses."""

from __future__ import annotations

import os
import re
from inspect import isclass, signature
from pathlib import Path
from typing import Any

from hydra.utils import get_object, instantiate
from lightning.pytorch.loggers import Logger, WandbLogger
from omegaconf import DictConfig

from lit_rlhf.apps.run_reader import numbers
from lit_rlhf.errors import UserError, first_line
from lit_rlhf.pipeline.stage_folder import StageFolder
from lit_rlhf.processes import is_main_process
from lit_rlhf.training import MetricsFile, TrackioLogger


def make_loggers(cfg: DictConfig, name: str, folder: StageFolder) -> list[Logger]:
    """``metrics.csv``, and one logger per entry of ``cfg.logger``; only for the process that writes.

    A logger learns the stage's folder, the run's and the stage's name where its class takes them. Raises ``UserError``
    where its package is missing, or it cannot start."""
    if not is_main_process():
        return []
    loggers: list[Logger] = [MetricsFile(folder.path / "metrics.csv")]
    for key, settings in cfg.logger.items():
        if settings is not None:
            logger = _logger(f"logger.{key}", settings, f"{cfg.run}/{name}", folder.path, name)
            _log_settings(logger, folder.settings)
            loggers.append(logger)
    return loggers


def log_report(cfg: DictConfig, report: Path, summary: dict[str, Any]) -> None:
    """Log the run's report to W&B, where that is chosen: a run of its own, with all figures and the page as an
    artifact."""
    for key, settings in cfg.logger.items():
        if settings is None or not _is_wandb(settings):
            continue
        logger = _logger(f"logger.{key}", settings, f"{cfg.run}/report", report.parent, "report")
        logger.log_metrics(numbers(summary), 0)
        logger.experiment.log_artifact(str(report), name=re.sub(r"[^\w.-]", "-", f"{cfg.run}-report"), type="report")
        close([logger])


def _is_wandb(settings: DictConfig) -> bool:
    kind = get_object(settings._target_)
    return isclass(kind) and issubclass(kind, WandbLogger)


def _log_settings(logger: Logger, settings: dict[str, Any]) -> None:
    if isinstance(logger, WandbLogger):
        logger.experiment.config.update(settings, allow_val_change=True)
    else:
        logger.log_hyperparams(settings)


def _logger(address: str, settings: DictConfig, name: str, folder: Path, job_type: str) -> Logger:
    make = instantiate(settings, _partial_=True)
    if wandb_chosen := _is_wandb(settings):
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        wandb.setup()  # now: until then nothing is silent, and Lightning passes a setting that W&B will drop
    told = {"save_dir": str(folder), "name": name, "run_name": name, "job_type": job_type}
    takes = signature(make.func).parameters
    try:
        logger: Logger = make(**{key: value for key, value in told.items() if key in takes and key not in settings})
        _ = logger.experiment  # which starts it
    except Exception as error:  # each logger's package has kinds of its own
        offline = " Go on offline by logger.wandb.mode=offline (upload later with `wandb sync`),"
        kept = offline if wandb_chosen else ""
        raise UserError(
            f"{address}: {settings._target_} cannot be used ({first_line(error)}).{kept or ' Go on'} without it by "
            "logger=csv"
        ) from None
    return logger


def log_figures(loggers: list[Logger], figures: dict[str, Any], step: int) -> None:
    """Give a stage's headline figures to the loggers: the summary of a run of W&B, else metrics ``summary/...``."""
    flat = numbers(figures)
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.summary.update(flat)
        elif not isinstance(logger, MetricsFile):
            logger.log_metrics({f"summary/{address}": value for address, value in flat.items()}, step)


def close(loggers: list[Logger]) -> None:
    """End the runs of W&B and Trackio, else the next stage would log into them."""
    for logger in loggers:
        if isinstance(logger, TrackioLogger):
            logger.finalize("success")
    if any(isinstance(logger, WandbLogger) for logger in loggers):
        import wandb

        wandb.finish()
