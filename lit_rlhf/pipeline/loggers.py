"""Where a stage's metrics go: ``metrics.csv``, and the loggers that ``logger`` chooses."""

from __future__ import annotations

import os
from inspect import signature

from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger, WandbLogger
from omegaconf import DictConfig

from lit_rlhf.errors import UserError, first_line
from lit_rlhf.pipeline.stage_folder import StageFolder
from lit_rlhf.processes import is_main_process
from lit_rlhf.training import MetricsFile

WANDB = "WandbLogger"


def make_loggers(cfg: DictConfig, name: str, folder: StageFolder) -> list[Logger]:
    """``metrics.csv``, and one logger per entry of ``cfg.logger``; only for the process that writes.

    A logger learns the stage's folder, the run's and the stage's name where its class takes them. Raises ``UserError``
    where its package is missing, or it cannot start."""
    if not is_main_process():
        return []
    loggers: list[Logger] = [MetricsFile(folder.path / "metrics.csv")]
    for key, settings in cfg.logger.items():
        if settings is not None:
            loggers.append(_logger(f"logger.{key}", settings, f"{cfg.run}/{name}", folder))
    return loggers


def _logger(address: str, settings: DictConfig, name: str, folder: StageFolder) -> Logger:
    kind = settings._target_.rpartition(".")[2]
    if kind == WANDB:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        wandb.setup()  # now: until then nothing is silent, and Lightning passes a setting that W&B will drop
    make = instantiate(settings, _partial_=True)
    told = {"save_dir": str(folder.path), "name": name, "run_name": name}
    takes = signature(make.func).parameters
    try:
        logger: Logger = make(**{key: value for key, value in told.items() if key in takes and key not in settings})
        _ = logger.experiment  # which starts it
        if isinstance(logger, WandbLogger):
            logger.experiment.config.update(folder.settings, allow_val_change=True)
        else:
            logger.log_hyperparams(folder.settings)
    except Exception as error:  # each logger's package has kinds of its own
        kept = " Go on offline by logger.wandb.mode=offline (upload later with `wandb sync`)," if kind == WANDB else ""
        raise UserError(
            f"{address}: {settings._target_} cannot be used ({first_line(error)}).{kept or ' Go on'} without it by "
            "logger=csv"
        ) from None
    return logger


def close(loggers: list[Logger]) -> None:
    """End the W&B run, else the next stage would log into it."""
    if any(isinstance(logger, WandbLogger) for logger in loggers):
        import wandb

        wandb.finish()
