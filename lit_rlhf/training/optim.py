"""Optimizer and learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal

import torch
from lightning import LightningModule, Trainer
from pydantic import Field
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from lit_rlhf.errors import UserError
from lit_rlhf.functional import orthogonalize
from lit_rlhf.training.batches import BatchLoader

OptimizerFactory = Callable[[Iterable[dict[str, Any]]], Optimizer]
Beta = Annotated[float, Field(ge=0, lt=1)]
Schedule = Callable[[Optimizer, int], LambdaLR]
HIDDEN = "hidden"  # of a group: which of its parameters are matrices between hidden states


def adamw(
    params: Iterable[Any],
    lr: Annotated[float, Field(ge=0)] = 5e-5,
    betas: tuple[Beta, Beta] = (0.9, 0.95),
    weight_decay: Annotated[float, Field(ge=0)] = 0.0,
    matrix_lr: Annotated[float, Field(ge=0)] | None = None,
    offload: bool = False,
) -> AdamW:
    """AdamW in its fused form, one kernel for all parameters, the fastest on CPU and GPU alike.

    The learning rate is one for all weights of a checkpoint; adapters want ten times as much, small models made from
    scratch a hundred times. With ``matrix_lr`` the matrices that groups of ``decay_groups`` call hidden are stepped by
    ``Muon``, at that rate: about as much as a step moves what such a matrix makes of a vector of length 1.

    Its state is there from the start: made in the first step, as PyTorch does it, it would lie in between what a step
    takes and gives back, and what the next one takes would not fit there. With ``offload``, which is AdamW's alone, it
    lies in the CPU's memory."""
    if offload and matrix_lr is not None:
        raise UserError(
            "offload=True (optimizer) keeps AdamW's state on the CPU, and not Muon's: leave matrix_lr at None (null)"
        )
    given = list(params)
    groups = [dict(group) for group in given] if given and isinstance(given[0], dict) else [{"params": given}]
    hidden = [group.pop(HIDDEN, None) for group in groups]
    if matrix_lr is not None:
        groups = [part for group, flags in zip(groups, hidden) for part in _split(group, flags, matrix_lr)]
    kind = OffloadedAdamW if offload else AdamW if matrix_lr is None else Muon
    optimizer = kind(groups, lr=lr, betas=tuple(betas), weight_decay=weight_decay, fused=True)
    # The fused step could unscale 16-bit gradients by itself, but Lightning then refuses to clip them before it.
    optimizer._step_supports_amp_scaling = False
    for group in optimizer.param_groups:
        names = ("exp_avg",) if group.get(HIDDEN) else ("exp_avg", "exp_avg_sq")
        for parameter in group["params"]:
            device = torch.device("cpu") if offload else parameter.device
            averages = {name: torch.zeros_like(parameter, device=device) for name in names}
            optimizer.state[parameter] = {"step": torch.zeros((), device=device), **averages}
    return optimizer


def _split(group: dict[str, Any], hidden: Sequence[bool] | None, matrix_lr: float) -> list[dict[str, Any]]:
    """What is no hidden matrix, and the hidden matrices, where there are any."""
    params = list(group["params"])
    flags = [False] * len(params) if hidden is None else hidden
    rest, matrices = ([p for p, flag in zip(params, flags, strict=True) if flag == kind] for kind in (False, True))
    groups = [{**group, "params": rest, HIDDEN: False}, {**group, "params": matrices, HIDDEN: True, "lr": matrix_lr}]
    return [part for part in groups if part["params"]]


class _InParts(AdamW):
    """AdamW of which a step is taken for some groups at a time."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:  # while all groups are there, whose gradients it may set to zero
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        try:
            self._step_parts(groups)
        finally:
            self.param_groups = groups
        return loss

    def _step_parts(self, groups: list[dict[str, Any]]) -> None:
        raise NotImplementedError

    def _step_of(self, groups: list[dict[str, Any]]) -> None:
        self.param_groups = groups
        super().step()


class Muon(_InParts):
    """AdamW, but for groups of ``hidden`` matrices: their step is the gradients' moving average with all its singular
    values made about 1, times the root of rows / columns where that is above 1 (K. Jordan, 2024, "Muon: An optimizer
    for hidden layers"). It keeps one number per number of a matrix, where AdamW keeps two.

    ``torch.optim.Muon`` iterates in bfloat16, where what other processes or smaller batches round differently grows to
    a hundredth of a step; here it stays in the matrices' own precision."""

    MOMENTUM = 0.95

    @torch.no_grad()
    def _step_parts(self, groups: list[dict[str, Any]]) -> None:
        self._step_of([group for group in groups if not group[HIDDEN]])
        for group in groups:
            for matrix in group["params"] if group[HIDDEN] else ():
                if matrix.grad is not None:
                    self._step_matrix(matrix, matrix.grad, group["lr"], group["weight_decay"])

    def _step_matrix(self, matrix: Tensor, gradient: Tensor, lr: float, weight_decay: float) -> None:
        average = self.state[matrix]["exp_avg"].lerp_(gradient, 1 - self.MOMENTUM)
        step = orthogonalize(gradient.lerp(average, self.MOMENTUM))  # Nesterov's
        rows, columns = matrix.shape
        matrix.mul_(1 - lr * weight_decay).add_(step, alpha=-lr * math.sqrt(max(1, rows / columns)))
        self.state[matrix]["step"] += 1


class OffloadedAdamW(_InParts):
    """AdamW whose state lies in the CPU's memory, and visits the device one parameter at a time.

    The same kernel computes in the same place as without it, so it comes to the same numbers. The state of one
    parameter is copied to the device and back in each step: 16 bytes per number."""

    def _step_parts(self, groups: list[dict[str, Any]]) -> None:
        for group in groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move_state(parameter, parameter.device)
                    self._step_of([{**group, "params": [parameter]}])
                    self._move_state(parameter, torch.device("cpu"))

    def _move_state(self, parameter: Tensor, device: torch.device) -> None:
        state = self.state[parameter]
        for name, value in state.items():
            if isinstance(value, Tensor) and value.dim() and value.device != device:
                pinned = value.is_cuda  # copies to and from pinned memory are the fast ones
                state[name] = torch.empty_like(value, device=device, pin_memory=pinned).copy_(value)


def decay_groups(
    model: nn.Module, head: Iterable[nn.Parameter] = (), head_lr: float | None = None, **settings: Any
) -> list[dict[str, Any]]:
    """Parameter groups of ``model``: weight decay for matrices only, none for norms and biases (GPT-3, appendix B).

    ``settings`` (a learning rate, say) go to all groups; the parameters ``head`` are a third one with the learning
    rate ``head_lr`` and without weight decay, unless that is None. The first group says which of its matrices are
    ``hidden``, neither of embeddings nor of heads, for ``Muon``."""
    head = list(head)
    trainable = [p for p in model.parameters() if p.requires_grad]
    apart = {id(p) for p in head} if head_lr is not None else set()
    rest = [p for p in trainable if id(p) not in apart]
    ends = {id(p) for p in (*head, *_of_ends(model))}
    matrices = [p for p in rest if p.dim() >= 2]
    groups = [
        {"params": matrices, HIDDEN: [p.dim() == 2 and id(p) not in ends for p in matrices], **settings},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0, **settings},
    ]
    if apart:
        fresh = [p for p in trainable if id(p) in apart]
        groups.append({"params": fresh, "weight_decay": 0.0, **settings, "lr": head_lr})
    return groups


def _of_ends(model: nn.Module) -> Iterable[nn.Parameter]:
    """Parameters of the embeddings and output layers inside of ``model``."""
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            yield from module.parameters()
        elif isinstance(module, PreTrainedModel) and (output := module.get_output_embeddings()) is not None:
            yield from output.parameters()


def warmup_decay(
    optimizer: Optimizer,
    total_steps: int,
    shape: Literal["cosine", "linear", "constant"] = "cosine",
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.1,
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
    """The return value of ``configure_optimizers``: the schedule runs over the trainer's whole budget of steps."""
    made = optimizer(groups)
    total = total_steps(module.trainer)
    return {"optimizer": made, "lr_scheduler": {"scheduler": schedule(made, total), "interval": "step"}}


def check_batches(loader: BatchLoader[Any]) -> None:
    """Raise ``UserError`` where an epoch would have no batch."""
    if len(loader) == 0:
        raise UserError(
            f"there are {loader.count} sequences to train on, less than the {loader.global_batch} of one step "
            f"(batch_size={loader.batch_size} times {loader.world_size} processes times accumulate_grad_batches="
            f"{loader.accumulate}); take smaller steps, or give more data"
        )


def training_loader(trainer: Trainer) -> Any:
    """What a trainer is about to read: of a data module, of the module, or given as it is.

    Raises ``UserError`` where it is a ``BatchLoader`` and an epoch would have no batch."""
    loader = trainer.fit_loop._data_source.dataloader()
    if isinstance(loader, BatchLoader):
        check_batches(loader)
    return loader


def total_steps(trainer: Trainer) -> int:
    """Optimizer steps of the whole training.

    Lightning's own ``estimated_stepping_batches`` sets up the loader before a checkpoint is read, and the loader's
    place is then never restored: a run that is resumed would begin its data anew."""
    loader = training_loader(trainer)
    if trainer.max_steps > 0:
        return trainer.max_steps
    if not isinstance(loader, BatchLoader):
        return int(trainer.estimated_stepping_batches)
    batches, limit = len(loader), trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    return -(-batches // trainer.accumulate_grad_batches) * (trainer.max_epochs or 1)
