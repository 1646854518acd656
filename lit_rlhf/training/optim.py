"""Optimizer and learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

from lightning import LightningModule, Trainer
from pydantic import Field
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

OptimizerFactory = Callable[[Iterable[dict[str, Any]]], Optimizer]
Beta = Annotated[float, Field(ge=0, lt=1)]
Schedule = Callable[[Optimizer, int], LambdaLR]


def adamw(
    params: Iterable[Any],
    lr: Annotated[float, Field(gt=0)] = 1e-3,
    betas: tuple[Beta, Beta] = (0.9, 0.95),
    weight_decay: Annotated[float, Field(ge=0)] = 0.0,
    fused: bool = True,
) -> AdamW:
    """AdamW; its ``fused`` form, one kernel for all parameters, is the fastest on CPU and GPU alike."""
    optimizer = AdamW(params, lr=lr, betas=tuple(betas), weight_decay=weight_decay, fused=fused)
    # The fused form could scale gradients back by itself, so Lightning refuses to clip them in mixed precision: they
    # would be clipped while scaled. Without that, they are scaled back before they are clipped.
    optimizer._step_supports_amp_scaling = False
    return optimizer


def decay_groups(model: nn.Module, **settings: Any) -> list[dict[str, Any]]:
    """Parameter groups of ``model``: weight decay for matrices only, none for norms and biases (GPT-3, appendix B).

    ``settings`` (a learning rate, say) go to both groups."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.dim() >= 2], **settings},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0, **settings},
    ]


def warmup_decay(
    optimizer: Optimizer,
    total_steps: int,
    shape: Literal["cosine", "linear", "constant"] = "cosine",
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.05,
    floor: Annotated[float, Field(ge=0, le=1)] = 0.1,
) -> LambdaLR:
    """Learning rate over ``total_steps``: a linear warm-up over the fraction ``warmup``, then down to ``floor``."""
    warmup_steps = max(1, round(warmup * total_steps))

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        if shape == "cosine":
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
        return floor + (1 - floor) * (1 - progress) if shape == "linear" else 1.0

    return LambdaLR(optimizer, factor)


def optimizer_and_schedule(
    module: LightningModule, groups: list[dict[str, Any]], optimizer: OptimizerFactory, schedule: Schedule
) -> dict[str, Any]:
    """What ``configure_optimizers`` returns: the schedule runs over the trainer's whole budget of steps."""
    made = optimizer(groups)
    total = total_steps(module.trainer)
    return {"optimizer": made, "lr_scheduler": {"scheduler": schedule(made, total), "interval": "step"}}


def total_steps(trainer: Trainer) -> int:
    """Optimizer steps of the whole training.

    Lightning's own ``estimated_stepping_batches`` sets up the loader before a checkpoint is read, and the loader's
    place is then never restored: a run that is resumed in the middle of an epoch would begin that epoch's data anew."""
    if trainer.max_steps > 0:
        return trainer.max_steps
    if trainer.datamodule is None:
        return int(trainer.estimated_stepping_batches)
    batches, limit = len(trainer.datamodule.train_dataloader()), trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    return -(-batches // trainer.accumulate_grad_batches) * (trainer.max_epochs or 1)
