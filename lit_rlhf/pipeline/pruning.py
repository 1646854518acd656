"""Ending a trial of Optuna's that falls behind."""

from __future__ import annotations

from lightning import Callback, LightningModule, Trainer

from lit_rlhf.errors import Pruned, UserError


class Pruning(Callback):
    """Reports a metric to a study after each validation, and ends the trial where the study's pruner says so.

    Args:
        monitor: the metric, better in the study's direction.
        storage, study_name, trial: which trial of which study; the sweeper gives them.

    Raises ``UserError`` where no sweeper has given them, and ``Pruned`` to end the trial."""

    def __init__(self, monitor: str, storage: str | None, study_name: str | None, trial: int | None) -> None:
        if storage is None or study_name is None or trial is None:
            raise UserError("callbacks=pruning: it ends trials of a sweep by hydra/sweeper=optuna; leave it out here")
        import optuna

        self.monitor = monitor
        study = optuna.load_study(study_name=study_name, storage=storage)
        self.trial = optuna.trial.Trial(study, study.get_trials(deepcopy=False)[trial]._trial_id)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or self.monitor not in trainer.callback_metrics:
            return
        value = float(trainer.callback_metrics[self.monitor])
        if trainer.is_global_zero:
            self.trial.report(value, trainer.global_step)
        worst = trainer.is_global_zero and self.trial.should_prune()
        if trainer.strategy.broadcast(worst):
            raise Pruned(f"{self.monitor} {value:.4g} after {trainer.global_step} steps is behind other trials")
