"""Attention of transformers' models as it is cheapest here: block by block, and in float32 on a CPU.

Sequences are laid one after another without padding (:mod:`lit_rlhf.text.packing`), and a sequence sees itself alone.
A mask over all of them would say so, too, at the price of looking at every pair; here attention is called once for
each block of sequences of one length.

In mixed precision on a CPU, the backward pass of PyTorch's scaled dot-product attention is several times as slow in
bfloat16 as in float32, and takes away what the matrix products gain. So it is computed in float32, and everything
around it in bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lit_rlhf.text.packing import Block

OWN = "sdpa_by_blocks"
SDPA = ("sdpa", OWN)  # one function, masks alike

# (queries (R, Hq, W, D), keys and values (R, Hkv, W, D), mask (R, 1, W, W) or None) -> (R, W, Hq, D)
Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def by_blocks(attend: Attend, blocks: Sequence[Block], masks: Sequence[Tensor] | None, *heads: Tensor) -> Tensor:
    """(T, Hq, D) from queries, keys and values (T, H, D), each block by itself; no masks: tokens see those before."""
    pieces = zip(*(x.split([rows * width for rows, width in blocks]) for x in heads))
    attended = [
        attend(*(x.view(*block, *x.shape[1:]).transpose(1, 2) for x in piece), mask).flatten(0, 1)
        for block, mask, piece in zip(blocks, masks or [None] * len(blocks), pieces)
    ]
    return torch.cat(attended) if len(attended) > 1 else attended[0]


class Layout:
    """The blocks of packed sequences, on their way to attention; ``masks`` as in :func:`by_blocks`.

    An object, for torch.compile would compile a layer anew for each tuple of blocks that it is called with."""

    def __init__(self, blocks: Sequence[Block], masks: Sequence[Tensor] | None) -> None:
        self.blocks, self.masks = blocks, masks


@torch.compiler.disable  # what it does depends on the blocks, and they are others in every batch
def own_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    layout: Layout | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """transformers' "sdpa", (B, H, T, D) -> (B, T, H, D), in the precision of ``value``.

    With a ``layout`` B is 1."""
    on_cpu, dtype = query.device.type == "cpu", value.dtype
    wide = on_cpu and (torch.is_autocast_enabled("cpu") or dtype in (torch.bfloat16, torch.float16))
    if wide:
        query, key, value = (x.float() if x.dtype != torch.float64 else x for x in (query, key, value))

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return sdpa_attention_forward(module, q, k, v, mask, **settings)[0]

    with torch.autocast("cpu", enabled=False) if wide else nullcontext():
        if layout is None:
            attended = attend(query, key, value, attention_mask)
        else:
            heads = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # x[0] would copy the gradient
            attended = by_blocks(attend, layout.blocks, layout.masks, *heads)[None]
    return attended.to(dtype), None


AttentionInterface.register(OWN, own_attention)
AttentionMaskInterface.register(OWN, sdpa_mask)


def use_own_attention(model: PreTrainedModel) -> None:
    """Let ``model`` compute its attention as this module has it; one given another kind than "sdpa" keeps that."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(OWN)


def sees_before_it(model: PreTrainedModel) -> bool:
    """Whether a token sees all before it, in all layers of ``model``, by an attention that may be ours."""
    config = model.config
    return (
        config._attn_implementation in SDPA
        and type(model)._supports_attention_backend
        and not type(model)._is_stateful  # layers of other kinds than attention carry on from token to token
        and getattr(config, "sliding_window", None) is None
        and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    )
