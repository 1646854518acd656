"""Attention of packed sequences, block by block.

Sequences are laid one after another without padding (:mod:`lit_rlhf.text.packing`), and each attends to itself alone.
A mask over all of them would say so, too, at the cost of computing every pair; here PyTorch's scaled dot-product
attention is called for each block of sequences of one length."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lit_rlhf.models.kernels.choice import fast_kernels
from lit_rlhf.text.packing import Block

BY_BLOCKS = "sdpa_by_blocks"  # the name under which transformers knows it
SDPA = ("sdpa", BY_BLOCKS)  # one function, masks alike
# Arguments of attention that change nothing here: blocks say it, or it is about what is returned.
USUAL = {
    "sliding_window", "is_causal", "position_ids", "cache_position", "use_cache", "output_attentions",
    "output_hidden_states", "return_dict",
}  # fmt: skip


class Layout:
    """The blocks of packed sequences, passed through the model to its attention.

    Tokens behind the last block attend to nothing: their result is 0. An object, for torch.compile would compile a
    layer anew for each tuple of blocks that it is called with.

    Args:
        blocks: one after another.
        masks: (R, 1, W, W) bool per block, True where a token attends; None: to itself and the tokens before it.
        positions: (R, W) per block, from which distances between tokens follow; None: from their columns.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        masks: Sequence[Tensor] | None = None,
        positions: Sequence[Tensor] | None = None,
    ) -> None:
        self.blocks, self.masks, self.positions = blocks, masks, positions
        self._within: dict[int, Layout] = {}

    def within(self, window: int | None, device: torch.device) -> Layout:
        """The layout where each token attends only to itself and the ``window`` - 1 before it; None: all before it."""
        if window is None or window >= max(width for _, width in self.blocks):
            return self
        if window not in self._within:
            masks = self.masks or [torch.ones(w, w, dtype=torch.bool, device=device).tril() for _, w in self.blocks]
            places = self.positions or [torch.arange(w, device=device).expand(r, w) for r, w in self.blocks]
            near = [place[:, None, :, None] - place[:, None, None, :] < window for place in places]
            self._within[window] = Layout(self.blocks, [mask & close for mask, close in zip(masks, near)])
        return self._within[window]


def attend(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, dropout: float = 0.0) -> Tensor:
    """softmax(q k^T scale) v (arXiv:1706.03762, eq. 1) of each block by itself.

    (T, Hq, D) from queries (T, Hq, D), and keys and values (T, Hkv, D), in the precision of ``value``; on a CPU 16-bit
    numbers are computed in float32, whose backward pass is several times as fast there."""
    dtype, groups = value.dtype, query.shape[1] // key.shape[1]
    if dtype in (torch.bfloat16, torch.float16) and query.device.type == "cpu":
        query, key, value = query.float(), key.float(), value.float()
    sizes = [rows * width for rows, width in layout.blocks]
    behind = len(query) - sum(sizes)
    pieces = zip(*(torch.split(x, [*sizes, behind] if behind else sizes) for x in (query, key, value)))
    attended = []
    for block, mask, piece in zip(layout.blocks, layout.masks or repeat(None), pieces):
        q, k, v = (x.view(*block, *x.shape[1:]).transpose(1, 2) for x in piece)
        out = F.scaled_dot_product_attention(
            q, k, v, mask, dropout, is_causal=mask is None, scale=scale, enable_gqa=groups > 1
        )
        attended.append(out.transpose(1, 2).flatten(0, 1))
    if behind:
        attended.append(attended[0].new_zeros(behind, *query.shape[1:]))
    return (torch.cat(attended) if len(attended) > 1 else attended[0]).to(dtype)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # what it does depends on the blocks, and they are others in every batch
def block_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    layout: Layout | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **settings: Any,
) -> tuple[Tensor, None]:
    """transformers' "sdpa", (B, H, T, D) -> (B, T, H, D), in the precision of ``value``; see :func:`attend`.

    With a ``layout`` B is 1. Raises ``NotImplementedError`` where it would have to be computed in another way."""
    rows, _, length, size = query.shape
    on_cpu, dtype = query.device.type == "cpu", value.dtype
    special = {name for name, value in settings.items() if value is not None and value is not False} - USUAL
    if layout is not None and (special or not getattr(module, "is_causal", True)):
        raise NotImplementedError(f"attention takes {', '.join(sorted(special)) or 'what is ahead into account'}")
    given = {"scaling": scaling, "dropout": dropout, **settings}
    if layout is None and not fast_kernels():
        return sdpa_attention_forward(module, query, key, value, attention_mask, **given)
    with torch.autocast("cpu", enabled=False) if on_cpu else nullcontext():
        if layout is not None:
            layout = layout.within(settings.get("sliding_window"), query.device)
            query, key, value = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
            scale = size**-0.5 if scaling is None else scaling
            attended = attend(query, key, value, layout, scale, dropout)
            return torch.unflatten(attended, 0, (rows, length)), None
        if on_cpu and dtype in (torch.bfloat16, torch.float16):
            query, key, value = query.float(), key.float(), value.float()
        return sdpa_attention_forward(module, query, key, value, attention_mask, **given)[0].to(dtype), None


@cache
def _register() -> None:
    """Tell transformers of :func:`block_attention`, once per process."""
    AttentionInterface.register(BY_BLOCKS, block_attention)
    AttentionMaskInterface.register(BY_BLOCKS, sdpa_mask)


def use_block_attention(model: PreTrainedModel) -> None:
    """Let ``model`` compute its attention by :func:`block_attention`; one that was given another kind than "sdpa" keeps
    it."""
    _register()
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(BY_BLOCKS)


def sees_before_it(model: Any) -> bool:
    """Whether every layer of ``model`` is causal attention, full or within a sliding window, that
    :func:`block_attention` can replace."""
    text = model.config.get_text_config()
    return (
        model.config._attn_implementation in SDPA
        and type(model)._supports_attention_backend
        and type(model)._supports_flash_attn  # it gets no mask: what a token does not see is said by arguments
        and not type(model)._is_stateful  # layers of other kinds than attention carry on from token to token
        and set(getattr(text, "layer_types", None) or []) <= {"full_attention", "sliding_attention"}
    )


def has_window(model: PreTrainedModel) -> bool:
    """Whether tokens of some layers attend only within a window."""
    text = model.config.get_text_config()
    return getattr(text, "sliding_window", None) is not None or "sliding_attention" in (
        getattr(text, "layer_types", None) or []
    )
