"""Stages that minimize a loss of each batch of their data: what their modules share."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from lightning import LightningDataModule
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.models.checkpoint import save_model
from lit_rlhf.models.lora import save_adapter
from lit_rlhf.models.reward_head import RewardTransformer
from lit_rlhf.stages.records import FitContext
from lit_rlhf.training.dry_run import Meter
from lit_rlhf.training.optim import OptimizerFactory, Schedule, decay_groups, optimizer_and_schedule
from lit_rlhf.training.parts import LearnsInParts, Part


class SupervisedModule(LearnsInParts):
    """Trains its ``policy`` on batches by :meth:`losses`; figures go by the name of its ``stage``.

    Args:
        tokenizer: with its chat template; saved beside the model.
        optimizer: receives parameter groups.
        schedule: receives the optimizer and the number of steps.
        max_grad_norm: gradients are clipped to this norm; None: they are not.
    """

    stage: ClassVar[str]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        optimizer: OptimizerFactory,
        schedule: Schedule,
        max_grad_norm: float | None,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.optimizer, self.schedule, self.max_grad_norm = optimizer, schedule, max_grad_norm

    @property
    def trained(self) -> PreTrainedModel | RewardTransformer:
        """The model that is trained and exported."""
        return self.policy

    def losses(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss of a batch, what is to be watched, by its name in the logs)."""
        raise NotImplementedError

    def training_step(self, batch: Any | list[Part[Any]], batch_idx: int) -> Tensor:
        loss, watched = self.in_parts(batch, batch_idx, self.losses)
        watched = {f"{self.stage}/loss": loss, **watched}
        self.latest_loss = watched[f"{self.stage}/loss"].detach()  # as validation has it
        for name, value in watched.items():
            self.log(name, value, prog_bar=name.endswith(("/loss", "/accuracy")))
        self.log(f"{self.stage}/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def configure_callbacks(self) -> list[Callback]:
        return [FitContext()]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimizer receives."""
        return decay_groups(self.trained)

    def configure_optimizers(self) -> dict[str, Any]:
        return optimizer_and_schedule(self, self.parameter_groups(), self.optimizer, self.schedule)

    def dry_run(self, meter: Meter, data: LightningDataModule) -> None:
        """One step of training and of validation, on models without values."""
        meter.fit(self, data, lambda batch: self.losses(batch)[0])

    def export(self, folder: Path) -> None:
        """Write ``model/``, which transformers loads; with LoRA also ``adapter/``."""
        save_model(self.trained, self.tokenizer, folder / "model")
        save_adapter(self.trained, self.tokenizer, folder / "adapter")
