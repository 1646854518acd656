"""Attention of transformers' models in mixed precision on a CPU.

There the backward pass of PyTorch's scaled dot-product attention is several times as slow in bfloat16 as in float32,
and takes away what the matrix products gain. So it is computed in float32, and everything around it in bfloat16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

FLOAT32 = "sdpa_float32"
SDPA = ("sdpa", FLOAT32)  # one function, masks alike


def attention_in_float32(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> tuple[Tensor, None]:
    """transformers' "sdpa", (B, H, T, D) -> (B, T, H, D), whatever the precision around it; the result in that one."""
    with torch.autocast(query.device.type, enabled=False):
        wide = (x.float() if x.dtype != torch.float64 else x for x in (query, key, value))
        attended, _ = sdpa_attention_forward(module, *wide, attention_mask, **settings)
    return attended.to(value.dtype), None


AttentionInterface.register(FLOAT32, attention_in_float32)
AttentionMaskInterface.register(FLOAT32, sdpa_mask)


def use_float32_attention(model: PreTrainedModel) -> None:
    """Let ``model`` compute its attention in float32; one that was given another kind than "sdpa" keeps that."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(FLOAT32)
