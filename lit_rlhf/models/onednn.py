"""Linear layers whose float32 products are oneDNN's, on a CPU.

PyTorch multiplies float32 matrices with MKL, which on processors of AMD is the slower of the two (figures in
docs/acceleration.md). Precision is that of float32 in both. Weights, names and checkpoints stay.

oneDNN prepares a product for each shape that it meets. That takes as long as the product of a thousand rows of a small
model, and half a MiB of memory, some of which it keeps for good: so rows are added until few numbers of them occur."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


def rows_up_to(multiple: int, count: int) -> int:
    """How many rows to add to ``count``: up to a multiple of ``multiple`` (1: none); from 16 times as many rows on, of
    that doubled as often as rows double."""
    if multiple == 1:
        return 0
    while 16 * multiple < count:
        multiple *= 2
    return -count % multiple


def rows_to_add(trunk: PreTrainedModel, count: int) -> int:
    """How many rows to multiply besides ``count``, so that few numbers of rows occur, where products are oneDNN's: of
    16-bit numbers on a CPU, and in layers that were told so (``trunk.by_onednn``).

    Their numbers are multiples of ``trunk.row_multiple``, 32 at first."""
    narrow = compute_dtype(trunk) in (torch.bfloat16, torch.float16) and trunk.device.type in ("cpu", "meta")
    by_onednn = narrow or getattr(trunk, "by_onednn", False)
    return rows_up_to(getattr(trunk, "row_multiple", 32), count) if by_onednn else 0


def compute_dtype(model: PreTrainedModel) -> torch.dtype:
    """What matrix products are computed in: the model's own, or what autocast says."""
    kind = model.device.type.replace("meta", "cpu")  # tensors without numbers have no autocast of their own
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else model.dtype


def with_rows_added(layer: Callable[[Tensor], Tensor], rows: Tensor, more: int) -> Tensor:
    """What ``layer`` makes of ``rows`` (N, D), each by itself, when it is given so many ``more``."""
    return layer(F.pad(rows, (0, 0, 0, more)))[: len(rows)] if more else layer(rows)


class _Product(torch.autograd.Function):
    """``x @ matrix + bias``: x (..., in), bias (out,) or None; matrix (out, in), or (in, out) where ``conv``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor, bias: Tensor | None, conv: bool) -> Tensor:
        ctx.save_for_backward(x, matrix)
        ctx.conv = conv
        return _times(x, matrix.t() if conv else matrix, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        x, matrix = ctx.saved_tensors
        for_x, for_matrix, for_bias, _ = ctx.needs_input_grad
        rows, slopes = x.flatten(0, -2), slope.flatten(0, -2)
        # The product over the rows is MKL's: oneDNN would first have to lay both sides out anew.
        return (
            _times(slope, matrix if ctx.conv else matrix.t(), None) if for_x else None,
            (rows.t() @ slopes if ctx.conv else slopes.t() @ rows) if for_matrix else None,
            slopes.sum(0) if for_bias else None,
            None,
        )


def _times(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """(..., out) from x (..., in) and matrix (out, in)."""
    return torch.ops.mkldnn._linear_pointwise(x, matrix, bias, "none", [], "")


def _suited(x: Tensor, matrix: Tensor) -> bool:
    return (
        x.device.type in ("cpu", "meta")  # without numbers, to see what it takes
        and x.dtype == matrix.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


class _Linear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        if _suited(input, self.weight):
            return _Product.apply(input, self.weight, self.bias, False)
        return super().forward(input)


class _Conv1D(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        if _suited(x, self.weight):
            return _Product.apply(x, self.weight, self.bias, True)
        return super().forward(x)


OURS = {nn.Linear: _Linear, Conv1D: _Conv1D}


def use_onednn(module: nn.Module, width: int) -> None:
    """Let linear layers of at least ``width`` inputs and outputs multiply by oneDNN, where PyTorch was built with it.

    Where float32 products were allowed to be less precise, PyTorch chooses."""
    has_it = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    if not has_it or torch.get_float32_matmul_precision() != "highest":
        return
    for layer in module.modules():
        if type(layer) in OURS and min(layer.weight.shape) >= width:
            layer.__class__ = OURS[type(layer)]


def uses_onednn(module: nn.Module) -> bool:
    """Whether :func:`use_onednn` has found layers inside of ``module``."""
    return any(type(layer) in OURS.values() for layer in module.modules())
