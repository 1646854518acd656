"""A batch in parts, each with a backward pass of its own: memory follows from a part, the gradients are the batch's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_rlhf.models.chunked import adds_to_gradients
from lit_rlhf.models.gathering import gathered
from lit_rlhf.models.micro_batches import tokens_at_once
from lit_rlhf.training.fsdp import FSDP2
from lit_rlhf.training.trained_state import TrainedState

Batch, Found = TypeVar("Batch"), TypeVar("Found")


class Part(NamedTuple, Generic[Batch]):
    """A part of a batch: what is learned in one backward pass."""

    batch: Batch
    share: float  # of its batch: losses of the parts, weighted so, add up to that of the whole


class DataInParts(LightningDataModule):
    """A data module whose batches of training come in parts of at most ``learned_at_once`` tokens, and those of
    validation have at most ``read_at_once``."""

    learned_at_once = read_at_once = 2**31  # tokens

    def fit_memory(self, module: nn.Module) -> None:
        """Give the models inside ``module`` as many tokens at once as there is memory for; see
        :func:`lit_rlhf.models.micro_batches.tokens_at_once`."""
        self.learned_at_once = tokens_at_once(module, learning=True)
        self.read_at_once = tokens_at_once(module, learning=False)


def losses_of(module: LightningModule, models: Sequence[Any], losses: Callable[[], Found]) -> Found:
    """``losses()``, while the weights of ``models`` are whole: those that ``module`` trains, or some of them None.

    Backward passes add to the gradients that are kept, see :func:`lit_rlhf.models.chunked.adds_to_gradients`, but where
    something waits for the gradient of each matrix, as DDP does."""

    def read() -> Found:
        adds = isinstance(module.trainer.strategy, SingleDeviceStrategy | FSDP2)
        with adds_to_gradients(module) if adds else nullcontext():
            return losses()

    for model in models:
        read = partial(gathered, model, read)
    return read()


class LearnsInParts(TrainedState):
    """A module with automatic optimization whose batches may come as a list of :class:`Part`.

    Gradients are clipped to the norm ``max_grad_norm``, where a module sets it, or as the trainer is told."""

    max_grad_norm: float | None = None
    latest_loss: Tensor | None = None  # of the step before, as validation has it
    _zeroed = False  # whether the gradients of the step before are gone, and there may be some of this one

    def in_parts(
        self,
        batch: Batch | list[Part[Batch]],
        batch_idx: int,
        losses: Callable[[Batch], tuple[Tensor, dict[str, Tensor | None]]],
    ) -> tuple[Tensor, dict[str, Tensor | None]]:
        """(loss, what is to be watched) of a whole batch, from those of its parts by ``losses``.

        The loss is that of the whole, and leads back to the last part alone: the gradients of those before it are there
        already. What is watched is a mean over the parts, weighted by their shares; None counts as 0."""
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.zero_grad()
            self._zeroed = True
        if not isinstance(batch, list):
            return losses(batch)
        total: Tensor | float = 0.0
        means: dict[str, Tensor | None] = {}
        for i, (part, share) in enumerate(batch):
            loss, watched = losses(part)
            for name, value in watched.items():
                known = means.get(name)
                new = None if value is None else value.detach() * share
                means[name] = new if known is None else known if new is None else known + new
            loss = loss * share
            if i < len(batch) - 1:
                self._add_gradients(loss)
                loss = loss.detach()
            total = total + loss
        return total, means

    def _add_gradients(self, loss: Tensor) -> None:
        strategy = self.trainer.strategy
        alone = nullcontext() if self.trainer.world_size == 1 else strategy.block_backward_sync()
        # As Lightning does it: out of mixed precision, for an average over the micro-batches of a step.
        with alone, torch.autocast(self.device.type, enabled=False):
            strategy.backward(loss / self.trainer.accumulate_grad_batches, None)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        norm = self.max_grad_norm if gradient_clip_val is None else gradient_clip_val
        self.clip_gradients(optimizer, norm, gradient_clip_algorithm)

    def optimizer_zero_grad(self, *arguments: Any) -> None:
        """Lightning asks for it between forward and backward pass, when :meth:`in_parts` has seen to it."""
        if not self._zeroed:
            super().optimizer_zero_grad(*arguments)
        self._zeroed = False
