"""The trainer of a stage: Lightning's, with what every stage needs already set."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from lightning import Trainer
from pydantic import Field

NEVER = 10**9  # steps


def make_trainer(
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto",
    devices: Annotated[int, Field(ge=1)] | Literal["auto"] | list[int] = 1,
    strategy: str = "auto",
    precision: Literal["32-true", "16-mixed", "bf16-mixed", "bf16-true", "64-true"] = "32-true",
    max_steps: Annotated[int, Field(ge=-1)] = -1,
    max_epochs: Annotated[int, Field(ge=1)] | None = None,
    limit_train_batches: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1)] = 1.0,
    accumulate_grad_batches: Annotated[int, Field(ge=1)] = 1,
    gradient_clip_val: Annotated[float, Field(gt=0)] | None = None,
    log_every_n_steps: Annotated[int, Field(ge=1)] = 10,
    val_check_interval: Annotated[int, Field(ge=1)] | None = None,
    limit_val_batches: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1)] = 1.0,
    deterministic: bool = False,
    **settings: Any,
) -> Trainer:
    """Lightning's trainer; the arguments are its own, with their ranges.

    ``val_check_interval`` counts steps; None leaves validation to whoever calls ``validate``. Checkpoints are the
    business of :class:`lit_rlhf.training.LastCheckpoint`."""
    return Trainer(
        accelerator=accelerator,
        devices=devices,
        strategy=strategy,
        precision=precision,
        max_steps=max_steps,
        max_epochs=-1 if max_epochs is None and max_steps > 0 else max_epochs or 1,
        limit_train_batches=limit_train_batches,
        accumulate_grad_batches=accumulate_grad_batches,
        gradient_clip_val=gradient_clip_val,
        log_every_n_steps=log_every_n_steps,
        val_check_interval=val_check_interval or NEVER,
        check_val_every_n_epoch=None,
        limit_val_batches=limit_val_batches,
        deterministic=deterministic,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        **settings,
    )
