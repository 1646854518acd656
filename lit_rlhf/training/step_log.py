"""Logging that costs nothing on the steps that nobody will see."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lit_rlhf.training.parts import LearnsInParts


class StepLog(LearnsInParts):
    """A module whose training steps are logged where they are written down: every ``log_every_n_steps``.

    Lightning's ``log`` takes a third of a millisecond a value (tensors, metrics and checks made anew), on every step,
    and hands on what the last step of every N had logged: the others are left out here. For figures that every step
    has, and automatic optimization; means over an epoch (``on_epoch=True``) would miss steps, and are refused.

    ``latest_loss`` is what the last training step, logged or not, gave as ``<stage>/loss``: what validation has too.
    Gradients are clipped to the norm ``max_grad_norm``, where a module sets it, or as the trainer is told."""

    latest_loss: Tensor | None = None
    max_grad_norm: float | None = None

    def log(self, name: str, value: Any, *args: Any, **settings: Any) -> None:
        if self.trainer.training:
            if settings.get("on_epoch"):
                raise ValueError(f"{name}: on_epoch=True is not for the training steps of a StepLog")
            if name.endswith("/loss"):
                self.latest_loss = value.detach()
            if (self.trainer.global_step + 1) % self.trainer.log_every_n_steps:
                return
        super().log(name, value, *args, **settings)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        norm = self.max_grad_norm if gradient_clip_val is None else gradient_clip_val
        self.clip_gradients(optimizer, norm, gradient_clip_algorithm)
