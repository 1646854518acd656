"""Matrix products by oneDNN on a CPU.

PyTorch multiplies float32 matrices with MKL, which for wide layers is the slower of the two on processors of AMD, and
the faster one on those of Intel (figures in docs/kernels.md); 16-bit ones with oneDNN. Precision is the same in both.
Weights, names and checkpoints stay.

oneDNN prepares a product for each shape that it meets. That takes as long as the product of a thousand rows of a small
model, and half a MiB of memory, some of which it keeps for good: so rows are added until few numbers of them occur."""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from lit_rlhf.models.kernels.choice import fast_kernels
from lit_rlhf.models.precision import compute_dtype

WIDTH = 128  # inputs and outputs of a layer from where on float32 products are faster by oneDNN, though shapes change
ROWS = 32  # of which the number of rows of a product is a multiple; of many rows a larger one


def rows_up_to(multiple: int, count: int) -> int:
    """Number of rows that pads ``count`` to a multiple of ``multiple``, which is doubled until ``count`` is at most 16
    times as large."""
    while 16 * multiple < count:
        multiple *= 2
    return -count % multiple


def rows_to_add(backbone: Any, count: int) -> int:
    """How many rows to multiply besides ``count``, so that few numbers of rows occur, where products are oneDNN's: on a
    CPU, of 16-bit numbers and in wide models."""
    if backbone.device.type not in ("cpu", "meta") or not fast_kernels():
        return 0
    narrow = compute_dtype(backbone) in (torch.bfloat16, torch.float16)
    wide = (getattr(backbone.config.get_text_config(), "hidden_size", None) or 0) >= WIDTH
    return rows_up_to(ROWS, count) if narrow or (wide and not by_intel()) else 0


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


def _product(*inputs: Any) -> Tensor:
    product: Tensor = _Product.apply(*inputs)  # type: ignore[no-untyped-call]
    return product


def _times(x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """(..., out) from x (..., in) and matrix (out, in)."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, matrix, bias, "none", [], "")
    return found


def has_onednn() -> bool:
    """Whether PyTorch was built with oneDNN, and nobody has switched it off."""
    backend: Any = torch.backends.mkldnn
    return bool(backend.is_available() and backend.enabled)


@cache
def by_intel() -> bool:
    """Whether the processor is Intel's, for which MKL is made."""
    known = Path("/proc/cpuinfo")  # on Linux, where `platform` knows the architecture alone
    return "GenuineIntel" in (known.read_text() if known.is_file() else platform.processor())


def multiplies(matrix: Tensor) -> bool:
    """Whether float32 products with a matrix of this shape should be oneDNN's, where PyTorch was built with it."""
    return has_onednn() and min(matrix.shape) >= WIDTH and not by_intel()


def _suited(x: Tensor, matrix: Tensor) -> bool:
    return (
        fast_kernels()
        and torch.get_float32_matmul_precision() == "highest"  # else PyTorch chooses
        and x.device.type in ("cpu", "meta")
        and x.dtype == matrix.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


class OneDNNLinear(nn.Linear):
    """``nn.Linear`` by :class:`_Product` where oneDNN is the faster one, else as ever."""

    def forward(self, input: Tensor) -> Tensor:
        if _suited(input, self.weight):
            return _product(input, self.weight, self.bias, False)
        return super().forward(input)


class OneDNNConv1D(Conv1D):
    """The same of transformers' ``Conv1D``, whose matrix is (in, out)."""

    def forward(self, x: Tensor) -> Tensor:
        if _suited(x, self.weight):
            return _product(x, self.weight, self.bias, True)
        found: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return found
