"""GELU by its tanh approximation, in fewer operations."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lit_rlhf.models.kernels.choice import fast_kernels

# gelu(x) = x/2 (1 + tanh(√(2/π) (x + 0.044715 x³))) (arXiv:1606.08415, section 2) = x σ(x (SLOPE + CUBE x²))
SLOPE = 2 * (2 / torch.pi) ** 0.5
CUBE = 0.044715 * SLOPE


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU of any shape: ``torch.nn.functional.gelu(x, approximate="tanh")``.

    On a CPU in float32 PyTorch's tanh takes several times as long as its sigmoid, which replaces it here in the forward
    and in the backward pass; errors against float64 are those of PyTorch's kernel, 5e-7."""
    suited = x.device.type in ("cpu", "meta") and x.dtype in (torch.float32, torch.float64)
    if not suited or torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")  # one pass over memory, on a GPU or by the compiler
    found: Tensor = _GELUTanh.apply(x)  # type: ignore[no-untyped-call]
    return found


class _GELUTanh(torch.autograd.Function):
    """Saves the derivative for the backward pass, instead of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        inner = torch.addcmul(torch.tensor(SLOPE, dtype=torch.float64), x, x, value=CUBE).mul_(x)
        if not ctx.needs_input_grad[0]:
            return inner.sigmoid_().mul_(x)
        # With z for the inner part: d/dx x σ(z) = σ + x z' σ (1 - σ), and x z' = 3 (z - 2/3 SLOPE x).
        share = inner.sigmoid()
        bent = inner.add_(x, alpha=-2 / 3 * SLOPE)
        bent = torch.ops.aten.sigmoid_backward.grad_input(bent, share, grad_input=bent)
        ctx.save_for_backward(torch.add(share, bent, alpha=3, out=bent))
        return share.mul_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        derivative: Tensor = ctx.saved_tensors[0]
        return grad * derivative


class GELUTanh(nn.Module):
    """:func:`gelu_tanh` in the place of transformers' ``plain`` module, which takes seven operations."""

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, x: Tensor) -> Tensor:
        """(...) -> (...)."""
        return gelu_tanh(x) if fast_kernels() else self.plain(x)
