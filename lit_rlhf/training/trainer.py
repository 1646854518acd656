"""The trainer of a stage: Lightning's, with what every stage needs already set."""

from __future__ import annotations

from inspect import signature
from typing import Annotated, Any, Literal

import torch
from lightning import Trainer
from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy
from pydantic import Field

from lit_rlhf.errors import UserError
from lit_rlhf.models.kernels import Kernels
from lit_rlhf.processes import by_srun
from lit_rlhf.training.checkpoint_files import CheckpointFiles
from lit_rlhf.training.fsdp import FSDP2
from lit_rlhf.training.model_settings import ModelSettings

NEVER = 10**9  # steps
SET_HERE: dict[str, Any] = {
    "check_val_every_n_epoch": None,
    "num_sanity_val_steps": 0,
    "enable_checkpointing": False,
    "enable_model_summary": False,
}


def make_trainer(
    accelerator: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto",
    devices: Annotated[int, Field(ge=1)] | Literal["auto"] | list[int] = 1,
    num_nodes: Annotated[int, Field(ge=1)] = 1,
    strategy: str | Strategy = "auto",
    precision: Literal["auto", "32-true", "16-mixed", "bf16-mixed", "bf16-true", "64-true"] = "32-true",
    matmul_precision: Literal["highest", "high", "medium"] = "highest",
    kernels: Kernels = "fast",
    activation_checkpointing: bool = False,
    compile: bool = False,
    kept_gib: Annotated[float, Field(gt=0)] = 0.5,
    max_steps: Annotated[int, Field(ge=1)] | Literal[-1] = -1,
    max_epochs: Annotated[int, Field(ge=1)] | None = None,
    limit_train_batches: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1)] = 1.0,
    accumulate_grad_batches: Annotated[int, Field(ge=1)] = 1,
    log_every_n_steps: Annotated[int, Field(ge=1)] = 10,
    val_check_interval: Annotated[int, Field(ge=1)] | None = None,
    limit_val_batches: Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, le=1)] = 1.0,
    deterministic: bool = False,
    **settings: Any,
) -> Trainer:
    """Lightning's trainer; the arguments are its own, with their ranges, but for those that follow.

    ``precision`` may be "auto": see :func:`precision_of`. ``matmul_precision`` is that of float32 matrix products,
    in the whole process (``torch.set_float32_matmul_precision``). For ``kernels``, ``activation_checkpointing``,
    ``compile`` and ``kept_gib`` see :class:`lit_rlhf.training.model_settings.ModelSettings`.

    The ``strategy`` "fsdp2" is :class:`lit_rlhf.training.fsdp.FSDP2`: models are sharded over the processes.

    ``val_check_interval`` counts steps; None leaves validation to whoever calls ``validate``. Checkpoints are the
    business of :class:`lit_rlhf.training.resuming.LastCheckpoint`."""
    torch.set_float32_matmul_precision(matmul_precision)
    precision = precision_of(precision, accelerator)
    strategy = sharding_of(strategy, precision, compile)
    if isinstance(strategy, FSDP2):
        settings |= {"inference_mode": False}  # what is gathered in inference mode could not be trained later
    models = ModelSettings(kernels, activation_checkpointing, compile, kept_gib)
    settings["plugins"] = _plugins(settings.get("plugins"), alone=devices == num_nodes == 1)
    trainer = Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=num_nodes,
        strategy=strategy,
        precision=precision,
        max_steps=max_steps,
        max_epochs=-1 if max_epochs is None and max_steps > 0 else max_epochs or 1,
        limit_train_batches=limit_train_batches,
        accumulate_grad_batches=accumulate_grad_batches,
        log_every_n_steps=log_every_n_steps,
        val_check_interval=val_check_interval or NEVER,
        limit_val_batches=limit_val_batches,
        deterministic=deterministic,
        callbacks=[*settings.pop("callbacks", []), models],
        **SET_HERE,
        **settings,
    )
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # and nobody has asked for another
        trainer.strategy.checkpoint_io = CheckpointFiles()
    trainer._signal_connector.register_signal_handlers = _no_handlers
    return trainer


def _no_handlers() -> None:
    """In place of Lightning's: on SIGTERM it has this process broadcast in the middle of whatever all of them do, and
    those that are apart by a step wait for each other until a time limit. ``LastCheckpoint`` handles signals."""


# Arguments of Lightning's that are passed on; the others are set here, or belong to whoever runs a stage.
make_trainer.further_settings = tuple(
    name
    for name in signature(Trainer).parameters
    if name not in {*signature(make_trainer).parameters, *SET_HERE}
    and name not in {"callbacks", "logger", "default_root_dir", "enable_progress_bar"}
)


def _plugins(given: list[Any] | None, alone: bool) -> list[Any]:
    if alone and given is None:
        return [LightningEnvironment()]  # one process, also where a launcher has started several
    if by_srun():  # else Lightning saves in the middle of a step when Slurm takes the machine back
        return [*(given or ()), SLURMEnvironment(auto_requeue=False)]
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():  # in a job, and no task of srun's
        return [*(given or ()), LightningEnvironment()]
    return given or []


def sharding_of(strategy: str | Strategy, precision: str, compile: bool) -> str | Strategy:
    """The strategy that "fsdp2" names; raises ``UserError`` where settings do not go together with sharding."""
    if isinstance(strategy, str) and strategy.startswith("fsdp") and strategy != "fsdp2":
        raise UserError(f"trainer.strategy={strategy}: sharded models are strategy=fsdp2 (or trainer=fsdp)")
    strategy = FSDP2() if strategy == "fsdp2" else strategy
    if isinstance(strategy, FSDP2):
        strategy.check(precision, compile)
    return strategy


def precision_of(setting: str, accelerator: str) -> str:
    """The precision that a trainer's ``precision`` means on this machine.

    "auto": bfloat16 where the processor multiplies matrices in it, else float32."""
    if setting != "auto":
        return setting
    if accelerator in ("gpu", "cuda", "auto") and torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = accelerator in ("cpu", "auto") and _cpu_has_bf16()
    return "bf16-mixed" if fast else "32-true"


def computes_in_half(precision: str) -> bool:
    """Whether models compute in 16 bits under a trainer's ``precision``."""
    return not precision.startswith(("32", "64"))


def _cpu_has_bf16() -> bool:
    # PyTorch has no public name for it; elsewhere than on x86 it is emulated, or not known here.
    asks = (getattr(torch.cpu, f"_is_{kind}_supported", None) for kind in ("avx512_bf16", "amx_tile"))
    return any(ask() for ask in asks if ask is not None)
