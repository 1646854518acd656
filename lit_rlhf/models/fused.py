"""Functions that transformers spells out in many small operations, by fewer: the same functions and weights.

Where a model is small, these cost as much as the matrix products, and in mixed precision more. Names stay as they are,
in checkpoints and in the config."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.activations import GELUTanh, NewGELUActivation
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RMSNorm

from lit_rlhf.models.attention import SDPA


def fuse(model: nn.Module) -> nn.Module:
    """Let ``model`` compute GPT-2's ``gelu_new`` by :func:`gelu_tanh`; of Llama and Qwen, turn queries and keys by
    three, and norm by five operations.

    transformers takes seven for the first, with a slow tanh, ten to turn, with twenty in the backward pass, and seven
    to norm, whose result in mixed precision is then cast anew for each product that reads it."""
    for module in list(model.modules()):
        if type(module) in FUSED:
            module.__class__ = FUSED[type(module)]
        for name, child in module.named_children():
            if isinstance(child, (NewGELUActivation, GELUTanh)):
                setattr(module, name, _Gelu())
            if name in ("input_layernorm", "post_attention_layernorm") and type(child) in NORMS:
                child.read_by_products = True
    return model


# gelu(x) = x/2 (1 + tanh(√(2/π) (x + 0.044715 x³))) (arXiv:1606.08415, section 2) = x σ(x (SLOPE + CUBE x²))
SLOPE = 2 * (2 / torch.pi) ** 0.5
CUBE = 0.044715 * SLOPE
_SLOPE = torch.tensor(SLOPE, dtype=torch.float64)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh, of any shape: ``torch.nn.functional.gelu(x, approximate="tanh")``.

    On a CPU in float32 PyTorch's tanh takes several times as long as its sigmoid, by which this is written there, in
    the forward pass and in the backward pass; errors against float64 are those of PyTorch's kernel, 5e-7."""
    suited = x.device.type in ("cpu", "meta") and x.dtype in (torch.float32, torch.float64)
    if not suited or torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")  # one pass over memory, on a GPU or by the compiler
    return _GeluTanh.apply(x)


class _GeluTanh(torch.autograd.Function):
    """Keeps the derivative for the backward pass, in the place of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        inner = torch.addcmul(_SLOPE, x, x, value=CUBE).mul_(x)
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
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        [derivative] = ctx.saved_tensors
        return slope * derivative


class _Gelu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """(...) -> (...)."""
        return gelu_tanh(x)


class _RMSNorm(torch.autograd.Function):
    """x / rms(x) * gain (arXiv:1910.07467, eq. 4), x (..., D); in float32 at least, and given out in ``dtype``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
        ctx.dtypes = x.dtype, gain.dtype
        wide = torch.promote_types(x.dtype, torch.float32)
        x, gain = x.to(wide), gain.to(wide)
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = size.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        normed = x * inverse
        ctx.save_for_backward(normed, inverse, gain)
        return (normed * gain).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        normed, inverse, gain = ctx.saved_tensors
        of_x, of_gain = ctx.dtypes
        slope = slope.to(normed.dtype)
        both = slope * normed
        # x / rms(x) does not change where x grows along itself, so what points there is taken off.
        along = torch.matmul(both, gain).div_(-normed.shape[-1]).unsqueeze(-1)
        slopes = (slope * gain).addcmul_(normed, along).mul_(inverse)
        return slopes.to(of_x), both.flatten(0, -2).sum(0).to(of_gain), None, None


class _Norming:
    read_by_products = False  # of matrices alone, which want it in the precision that they are computed in

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        dtype, kind = torch.promote_types(hidden_states.dtype, self.weight.dtype), hidden_states.device.type
        kind = "cpu" if kind == "meta" else kind  # which has no autocast of its own
        if self.read_by_products and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        return _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon, dtype)


class _Turn(torch.autograd.Function):
    """Queries and keys (B, T, H, D) at their positions, given as cosines and sines (B, T, D) (arXiv:2104.09864)."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = queries.dtype
        return _turned(queries, cos, sin), _turned(keys, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, queries: Tensor, keys: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        back = (_turned(slope, cos, sin, -1.0).to(ctx.dtype) for slope in (queries, keys))
        return (*back, None, None)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, direction: float = 1.0) -> Tensor:
    """Pairs (i, i + D/2) of ``x`` (B, T, H, D) turned by the angles, or back by a ``direction`` of -1."""
    half = x.shape[-1] // 2
    x, cos, sin = x.to(torch.promote_types(x.dtype, cos.dtype)), cos.unsqueeze(2), sin[:, :, None, :half]
    turned = x * cos
    turned[..., :half].addcmul_(x[..., half:], sin, value=-direction)
    turned[..., half:].addcmul_(x[..., :half], sin, value=direction)
    return turned


class _Turning:
    """Attention without a cache, by "sdpa" or ours; all else is left to transformers."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **settings: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, E) -> (B, T, E)."""
        kind = self.config._attn_implementation
        if past_key_values is not None or kind not in SDPA:
            return super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, **settings)
        heads = *hidden_states.shape[:-1], -1, self.head_dim
        queries, keys, values = (f(hidden_states).view(heads) for f in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            queries, keys = self.q_norm(queries), self.k_norm(keys)
        queries, keys = _Turn.apply(queries, keys, *position_embeddings)
        attended, _ = AttentionInterface().get_interface(kind, None)(
            self,
            *(x.transpose(1, 2) for x in (queries, keys, values)),
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=getattr(self, "sliding_window", None),
            **settings,
        )
        return self.o_proj(attended.flatten(-2)), None


class _Llama(_Turning, LlamaAttention):
    pass


class _Qwen2(_Turning, Qwen2Attention):
    pass


class _Qwen3(_Turning, Qwen3Attention):
    pass


class _LlamaNorm(_Norming, LlamaRMSNorm):
    pass


class _Qwen2Norm(_Norming, Qwen2RMSNorm):
    pass


class _Qwen3Norm(_Norming, Qwen3RMSNorm):
    pass


TURNING = {LlamaAttention: _Llama, Qwen2Attention: _Qwen2, Qwen3Attention: _Qwen3}
NORMS = {LlamaRMSNorm: _LlamaNorm, Qwen2RMSNorm: _Qwen2Norm, Qwen3RMSNorm: _Qwen3Norm}
FUSED = TURNING | NORMS
