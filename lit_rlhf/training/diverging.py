"""Checks for NaN and infinity that end a training before weights or checkpoints are touched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_rlhf.errors import NotFinite
from lit_rlhf.models.finite import not_finite
from lit_rlhf.models.gathering import full

WEIGHTS = "tensor"  # what is said of a weight begins so


class StopOnNonFinite(Callback):
    """Ends training before a loss or a gradient that is not a finite number can touch the weights.

    To what is raised for any tensor it adds the step, and a weight that is the cause."""

    def __init__(self, stage: str) -> None:
        self.stage = stage

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise NotFinite(f"the loss is {loss.item()}")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        check_gradients(pl_module, (p for group in optimizer.param_groups for p in group["params"]))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not isinstance(exception, NotFinite):
            return
        what, said = str(exception), ""
        if not what.startswith(WEIGHTS) and (said := next(non_finite_weights(pl_module), "")):
            what = f"{said}, so {what}"
        if trainer.state.fn != "fit":
            exception.args = (f"{self.stage}: {what}; nothing comes of that. Take a model from before it diverged",)
            return
        step = trainer.fit_loop.epoch_loop.total_batch_idx + 1
        place = f"in the validation after step {step}" if trainer.validating else f"at step {step}"
        done = "stopped there" if what.startswith(WEIGHTS) else "stopped before the weights changed"
        exception.args = (
            f"{self.stage}: {place} {what}; {done}. Usual cures: a lower {self.stage}.optimizer.lr, gradient clipping, "
            "precision 32-true.",
        )


def check_gradients(module: nn.Module, parameters: Iterable[nn.Parameter]) -> Tensor:
    """The norm of the gradients of ``parameters``. Raises :class:`lit_rlhf.errors.NotFinite`, with names of the
    ``module``, where it is not finite."""
    norm = full(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    if not torch.isfinite(norm):
        names = [n for n, p in module.named_parameters() if p.grad is not None and not full(p.grad).isfinite().all()]
        said = f"the gradient of {len(names)} parameters is not finite, {names[0]} among them"
        raise NotFinite(said if names else f"the norm of the gradients is {norm.item()}, beyond what floats hold")
    return norm


def clip_gradients(module: nn.Module, part: nn.Module, max_norm: float) -> Tensor:
    """Clip the gradients of a ``part`` of the ``module`` to a norm; returns what it was. Raises as
    :func:`check_gradients` does, before it scales any."""
    norm = check_gradients(module, part.parameters())
    torch.nn.utils.clip_grads_with_norm_(part.parameters(), max_norm, norm)
    return norm


def non_finite_weights(module: nn.Module, optimizers: Iterable[Optimizer] = ()) -> Iterator[str]:
    """Descriptions of weights and of optimizers' tensors that hold NaN or infinity."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    for parameter, name in names.items():
        if said := not_finite(parameter):
            yield f"{WEIGHTS} {name} holds {said}"
    for parameter, state in ((p, s) for optimizer in optimizers for p, s in optimizer.state.items()):
        for key, value in state.items():
            if isinstance(value, Tensor) and (said := not_finite(value)):
                yield f"the optimizer's {key} of {names.get(parameter)} holds {said}"
