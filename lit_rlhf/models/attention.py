"""Attention of transformers' models as it is cheapest here: block by block, and on a CPU as batched matrix products.

Sequences are laid one after another without padding (:mod:`lit_rlhf.text.packing`), and a sequence sees itself alone.
A mask over all of them would say so, too, at the price of looking at every pair; here attention is computed for each
block of sequences of one length.

PyTorch's scaled dot-product attention for CPUs multiplies the small matrices of each row and head by themselves. Two
threads are hardly faster at that than one, and its backward pass is several times as slow in bfloat16 as in float32.
Products of all rows and heads of a block at once scale with threads, and in bfloat16 take half the time; but they keep
the attention's weights for the backward pass, and cost more calls. So rows that are longer than ``LONGEST``, and with
one thread all but large blocks in bfloat16, are left to PyTorch, in float32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lit_rlhf.text.packing import Block

BATCHED, BY_SDPA = "batched_by_blocks", "sdpa_by_blocks"
SDPA = ("sdpa", BATCHED, BY_SDPA)  # one function, masks alike
LONGEST = 256  # tokens of a row
NARROW_FROM = 512  # tokens of a block: with fewer, products in bfloat16 take longer than in float32 to set up


class Layout:
    """The blocks of packed sequences, on their way to attention; ``masks`` say what each token of a block's rows sees,
    (R, 1, W, W) bool a block; None: the tokens before it and itself. Tokens behind the last block see nothing: 0.

    An object, for torch.compile would compile a layer anew for each tuple of blocks that it is called with."""

    def __init__(self, blocks: Sequence[Block], masks: Sequence[Tensor] | None = None) -> None:
        self.blocks, self.masks = blocks, masks

    @cached_property
    def biases(self) -> list[Tensor]:
        """0 where a token is seen and -inf elsewhere, to be broadcast to (R, H, W, W); the same in all layers."""
        if self.masks is not None:
            return [torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf) for mask in self.masks]
        return [torch.full((width, width), -torch.inf).triu_(1) for _, width in self.blocks]

    def behind(self, x: Tensor) -> int:
        """How many tokens of ``x`` (T, ...) stand behind the last block."""
        return len(x) - sum(r * w for r, w in self.blocks)

    def pieces(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Of each block, the parts (R, H, W, D) of ``tensors`` (T, H, D): views of them."""
        sizes = [*(r * w for r, w in self.blocks), self.behind(tensors[0])]
        for block, *parts in zip(self.blocks, *(x.split(sizes) for x in tensors)):
            yield tuple(x.view(*block, *x.shape[1:]).transpose(1, 2) for x in parts)


class _Batched(torch.autograd.Function):
    """softmax(q k^T scale) v of each block (arXiv:1706.03762, eq. 1), and its derivatives.

    Of 16-bit numbers scores and softmax are float32, as in PyTorch's kernels; other products are in float32, too, where
    the block is small."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
        """(T, H, D) each -> (T, H, D) in the precision of ``value``."""
        out, kept = torch.empty_like(value), []
        out[len(out) - layout.behind(out) :] = 0
        wide = torch.promote_types(value.dtype, torch.float32)
        for bias, (q, k, v, attended) in zip(layout.biases, layout.pieces(query, key, value, out)):
            rows, heads, width, _ = q.shape
            narrow = value.dtype if rows * width >= NARROW_FROM else wide
            q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
            scores = q.new_empty(rows, heads, width, width, dtype=wide).copy_(bias).flatten(0, 1)
            weights = scores.baddbmm_(q.to(wide), k.to(wide).transpose(1, 2), alpha=scale).softmax(-1).to(narrow)
            q, k, v = (x.to(narrow) for x in (q, k, v))
            attended.copy_(weights.bmm(v).view(attended.shape))
            kept += [q, k, v, weights]
        ctx.save_for_backward(*kept)
        ctx.layout, ctx.scale, ctx.dtypes = layout, scale, [x.dtype for x in (query, key, value)]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        slopes = [torch.empty(slope.shape, dtype=dtype, device=slope.device) for dtype in ctx.dtypes]
        for of_rows in slopes:
            of_rows[len(slope) - ctx.layout.behind(slope) :] = 0
        kept = iter(ctx.saved_tensors)
        with torch.autocast("cpu", enabled=False):
            for of_attended, of_q, of_k, of_v in ctx.layout.pieces(slope, *slopes):
                q, k, v, weights = (next(kept) for _ in range(4))
                of_attended = of_attended.to(v.dtype).reshape(v.shape)
                of_v.copy_(weights.transpose(1, 2).bmm(of_attended).view(of_v.shape))
                of_weights = of_attended.bmm(v.transpose(1, 2))
                of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype)
                torch.mul(of_scores.bmm(k).view(of_q.shape), ctx.scale, out=of_q)
                torch.mul(of_scores.transpose(1, 2).bmm(q).view(of_k.shape), ctx.scale, out=of_k)
        return *slopes, None, None


def attend(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, dropout: float = 0.0, batched: bool = True
) -> Tensor:
    """(T, Hq, D) from queries, and keys and values (T, Hkv, D), each block by itself, in the precision of ``value``.

    ``batched``: by batched products where that is faster; else by PyTorch's scaled dot-product attention."""
    on, groups = query.device.type, query.shape[1] // key.shape[1]
    fits = not dropout and max(width for _, width in layout.blocks) <= LONGEST
    narrow = value.dtype in (torch.bfloat16, torch.float16)
    pays = torch.get_num_threads() > 1 or (narrow and len(query) >= NARROW_FROM * len(layout.blocks))
    if batched and on in ("cpu", "meta") and fits and pays:
        if groups > 1:
            key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        return _Batched.apply(query, key, value, layout, scale)
    heads = (x.float() for x in (query, key, value)) if narrow and on == "cpu" else (query, key, value)
    masks = layout.masks or [None] * len(layout.blocks)
    attended = [
        F.scaled_dot_product_attention(
            q, k, v, mask, dropout, is_causal=mask is None, scale=scale, enable_gqa=groups > 1
        )
        .transpose(1, 2)
        .flatten(0, 1)
        for mask, (q, k, v) in zip(masks, layout.pieces(*heads))
    ]
    if behind := layout.behind(query):
        attended.append(attended[0].new_zeros(behind, *query.shape[1:]))
    return (torch.cat(attended) if len(attended) > 1 else attended[0]).to(value.dtype)


@torch.compiler.disable  # what it does depends on the blocks, and they are others in every batch
def own_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    layout: Layout | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    batched: bool = True,
    **settings: Any,
) -> tuple[Tensor, None]:
    """transformers' "sdpa", (B, H, T, D) -> (B, T, H, D), in the precision of ``value``; see :func:`attend`.

    With a ``layout`` B is 1."""
    rows, _, length, size = query.shape
    on_cpu, dtype = query.device.type == "cpu", value.dtype
    causal = attention_mask is None and getattr(module, "is_causal", True)
    if layout is None and causal and length == key.shape[2] > 1:
        layout = Layout([Block(rows, length)])
    with torch.autocast("cpu", enabled=False) if on_cpu else nullcontext():
        if layout is not None:
            heads = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
            scale = size**-0.5 if scaling is None else scaling
            return attend(*heads, layout, scale, dropout, batched).unflatten(0, (rows, length)), None
        if on_cpu and dtype in (torch.bfloat16, torch.float16):
            query, key, value = query.float(), key.float(), value.float()
        given = {"scaling": scaling, "dropout": dropout, **settings}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **given)[0].to(dtype), None


for _name, _kind in ((BATCHED, own_attention), (BY_SDPA, partial(own_attention, batched=False))):
    AttentionInterface.register(_name, _kind)
    AttentionMaskInterface.register(_name, sdpa_mask)


def use_own_attention(model: PreTrainedModel, batched: bool | None = None) -> None:
    """Let ``model`` compute its attention as this module has it; one given another kind than "sdpa" keeps that.

    ``batched``: see :func:`attend`; None: as it was last set, and True at first."""
    kind = model.config._attn_implementation
    if kind == "sdpa" or (batched is not None and kind in SDPA):
        model.set_attn_implementation(BY_SDPA if batched is False else BATCHED)


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
