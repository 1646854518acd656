"""Numbers that are NaN or infinite, found and named before anything is made of them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from lit_rlhf.errors import NotFinite, UserError


def not_finite(tensor: Tensor) -> str:
    """How many numbers of a tensor are NaN or infinite, in words; "" where none is."""
    # Least and largest are NaN where one number is: a pass over memory that takes none.
    tensor = tensor.detach()
    tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor  # this process's part of a sharded one
    if tensor.is_meta or not tensor.is_floating_point() or not tensor.numel():
        return ""
    if torch.stack(tensor.aminmax()).isfinite().all():
        return ""
    bad = tensor.numel() - int(tensor.isfinite().sum())
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{bad} of {tensor.numel()} numbers that are NaN or infinite (as {dtype})"


def check_finite(
    model: torch.nn.Module, path: str | Path, cure: str = "take a checkpoint from before it diverged"
) -> None:
    """Raise ``UserError``, with its name, where a tensor holds NaN or infinity."""
    for name, tensor in model.state_dict().items():
        if said := not_finite(tensor):
            raise UserError(f"{path}: tensor {name} holds {said}; {cure}")


def finite(tensor: Tensor, name: str) -> Tensor:
    """The tensor. Raises :class:`lit_rlhf.errors.NotFinite`, with its ``name`` (a plural), where it is not finite."""
    if said := not_finite(tensor):
        raise NotFinite(f"{name} hold {said}")
    return tensor


def blame(loss: Tensor, name: str, tensor: Tensor) -> None:
    """Raise :class:`lit_rlhf.errors.NotFinite` where the ``loss`` is not finite, and the ``tensor`` of this ``name``
    that it was made of is not."""
    if not_finite(loss):
        finite(tensor, name)
