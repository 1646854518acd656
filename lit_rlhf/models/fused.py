"""Functions that transformers spells out in many small operations, by fewer: the same functions and weights.

Where a model is small, these cost as much as the matrix products, and in mixed precision more. Names stay as they are,
in checkpoints and in the config."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.activations import NewGELUActivation
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from lit_rlhf.models.attention import SDPA


def fuse(model: nn.Module) -> nn.Module:
    """Let ``model`` compute GPT-2's ``gelu_new`` by one kernel, and turn queries and keys of Llama and Qwen by three.

    transformers takes seven for the one; and for the other ten, with twenty in the backward pass."""
    for module in list(model.modules()):
        if type(module) in TURNING:
            module.__class__ = TURNING[type(module)]
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))
    return model


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


TURNING = {LlamaAttention: _Llama, Qwen2Attention: _Qwen2, Qwen3Attention: _Qwen3}
