"""Stages that minimize a loss of each batch of their data: what their modules share."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from lightning import LightningDataModule
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.models.checkpoint import save_model
from lit_rlhf.models.lora import save_adapter
from lit_rlhf.models.reward_head import RewardTransformer
from lit_rlhf.stages.records import FitContext
from lit_rlhf.training.all_processes import gather_step, mean_of_all
from lit_rlhf.training.batches import largest
from lit_rlhf.training.dry_run import Meter
from lit_rlhf.training.optim import OptimizerFactory, Schedule, decay_groups, optimizer_and_schedule
from lit_rlhf.training.parts import LearnsInParts, Part, losses_of


class MeanLoss(NamedTuple):
    """Loss of a held-out batch, a mean over its tokens."""

    loss: Tensor
    tokens: int


def mean_loss(losses: Iterable[MeanLoss]) -> Tensor:
    """Mean over the tokens of all batches."""
    total, count = torch.zeros(()), 0
    for loss, tokens in losses:
        loss = loss.to(torch.promote_types(loss.dtype, total.dtype))  # not in 16 bits
        total, count = total.to(loss.device) + loss * tokens, count + tokens
    return total / count


class SupervisedModule(LearnsInParts):
    """Trains its ``policy`` on batches by :meth:`losses`; figures go by the name of its ``stage``.

    Processes share out the held-out batches; each knows what :meth:`examined` makes of all of them, once each.

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
        self.held_out: list[Any] = []  # what the last validation found, batch by batch

    @property
    def trained(self) -> PreTrainedModel | RewardTransformer:
        """The model that is trained and exported."""
        return self.policy

    def losses(self, batch: Any) -> tuple[Tensor, dict[str, Tensor | None]]:
        """(loss of a batch, what is to be watched, by its name in the logs).

        Both are such that the mean over the micro-batches of an optimizer step is that of all its examples; None, by
        the same name in each: nothing of it in this one, which is as 0."""
        raise NotImplementedError

    def examined(self, batch: Any, dataloader_idx: int) -> Any:
        """Values that validation keeps of a batch."""
        raise NotImplementedError

    def held_out_metrics(self) -> dict[str, Tensor]:
        """Metrics of a validation, by their names behind ``val/<stage>/``."""
        raise NotImplementedError

    def training_step(self, batch: Any | list[Part[Any]], batch_idx: int) -> Tensor:
        loss, seen = self.in_parts(batch, batch_idx, self._losses)
        watched = mean_of_all(self.trainer, {f"{self.stage}/loss": loss, **seen})
        self.latest_loss = watched[f"{self.stage}/loss"].detach()  # as validation has it
        for name, value in watched.items():
            self.log(name, value, prog_bar=name.endswith(("/loss", "/accuracy")))
        self.log(f"{self.stage}/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def _losses(self, batch: Any) -> tuple[Tensor, dict[str, Tensor | None]]:
        return losses_of(self, [self.trained], partial(self.losses, batch))

    def on_validation_epoch_start(self) -> None:
        self.held_out = []

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.held_out += gather_step(self.trainer, self.examined(batch, dataloader_idx), batch_idx, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        metrics = self.held_out_metrics()
        self.log_dict({f"val/{self.stage}/{name}": value for name, value in metrics.items()}, prog_bar=True)

    def configure_callbacks(self) -> list[Callback]:
        return [FitContext()]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameter groups of the optimizer."""
        return decay_groups(self.trained)

    def configure_optimizers(self) -> dict[str, Any]:
        return optimizer_and_schedule(self, self.parameter_groups(), self.optimizer, self.schedule)

    def dry_run(self, meter: Meter, data: LightningDataModule) -> None:
        """A step on the largest batch of training, and the losses of the largest of validation if that is larger."""
        batch = largest(data.train_dataloader())
        parts = batch if isinstance(batch, list) else [Part(batch, 1.0)]
        part = largest([parts]).batch
        meter.learn(self, lambda: self.losses(part)[0], isinstance(batch, list), len(parts))
        meter.times = 0  # validation is no part of an iteration
        held_out = largest(data.val_dataloader())
        if largest([[part, held_out]]) is held_out:
            with torch.no_grad():
                self.losses(held_out)

    def export(self, folder: Path) -> None:
        """Write ``model/``, which transformers loads; with LoRA also ``adapter/``."""
        save_model(self.trained, self.tokenizer, folder / "model")
        save_adapter(self.trained, self.tokenizer, folder / "adapter")
