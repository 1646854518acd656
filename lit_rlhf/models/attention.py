"""Attention of transformers' models as it is cheapest here: block by block, and on a CPU as batched matrix products.

Sequences are laid one after another without padding (:mod:`lit_rlhf.text.packing`), and a sequence sees itself alone.
A mask over all of them would say so, too, at the price of looking at every pair; here attention is computed for each
block of sequences of one length.

PyTorch's scaled dot-product attention for CPUs multiplies the small matrices of each row and head by themselves. Two
threads are hardly faster at that than one, and its backward pass is several times as slow in bfloat16 as in float32.
Products of all rows and heads at once scale with threads, and in bfloat16 take half the time; but they keep the
attention's weights for the backward pass, and cost more calls, after each of which threads wait for one another. So
blocks of about one length are laid out as one tile, padded: attention looks at some tokens in vain, and nothing else
does. Rows that are longer than ``LONGEST``, and with one thread all but large tiles in bfloat16, are left to PyTorch,
in float32."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lit_rlhf.text.packing import Block, cheapest_runs

BATCHED, BY_SDPA = "batched_by_blocks", "sdpa_by_blocks"
SDPA = ("sdpa", BATCHED, BY_SDPA)  # one function, masks alike
LONGEST = 256  # tokens of a row
NARROW_FROM = 512  # tokens of a tile: with fewer, products in bfloat16 take longer than in float32 to set up
EVEN = 8  # widths of tiles are a multiple of it where products are of 16-bit numbers: few shapes (models/onednn)
# Arguments of attention that change nothing here: blocks say it, or it is about what is given out.
USUAL = {
    "sliding_window", "is_causal", "position_ids", "cache_position", "use_cache", "output_attentions",
    "output_hidden_states", "return_dict",
}  # fmt: skip
TILE = 100_000  # what a tile costs, in weights of attention: its calls, forward and backward, and waiting for threads


class Tile:
    """Blocks side by side: R rows of one width W, padding at the end of those that are shorter.

    Args:
        blocks: one after another.
        masks: (r, 1, w, w) bool of each, which token of a row sees which; None: each those before it, and itself.
        multiple: W is the smallest multiple of it into which all fit.
    """

    def __init__(self, blocks: Sequence[Block], masks: Sequence[Tensor] | None = None, multiple: int = 1) -> None:
        self.rows, self.width = sum(b.rows for b in blocks), _up_to(multiple, max(b.width for b in blocks))
        self.tokens = sum(rows * width for rows, width in blocks)
        self.padded = self.tokens < self.rows * self.width
        self._blocks, self._masks = blocks, masks
        self._index: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    @cached_property
    def mask(self) -> Tensor | None:
        """(R, 1, W, W) bool; None: each token sees those before it, and itself."""
        if self._masks is None or not self.padded:
            return self._masks and torch.cat(tuple(self._masks))
        # What padding sees nobody reads, but a softmax over nothing would be no number.
        joined = torch.eye(self.width, dtype=torch.bool).repeat(self.rows, 1, 1, 1)
        for rows, mask in zip(joined.split([len(mask) for mask in self._masks]), self._masks):
            rows[..., : mask.shape[-1], : mask.shape[-1]] = mask
        return joined

    @cached_property
    def bias(self) -> Tensor:
        """0 where a token is seen and -inf elsewhere, to be broadcast to (R, H, W, W); the same in all layers."""
        if self.mask is None:
            return torch.full((self.width, self.width), -torch.inf).triu_(1)
        return torch.zeros(self.mask.shape, device=self.mask.device).masked_fill_(~self.mask, -torch.inf)

    def laid_out(self, x: Tensor) -> Tensor:
        """(tokens, H, D) as (R, H, W, D)."""
        if self.padded:
            return _LaidOut.apply(x, self)
        return x.view(self.rows, self.width, *x.shape[1:]).transpose(1, 2)

    def taken_back(self, x: Tensor) -> Tensor:
        """(R, H, W, D) as (tokens, H, D)."""
        return _TakenBack.apply(x, self) if self.padded else x.transpose(1, 2).flatten(0, 1)

    def index(self, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """(there, padding, back): which head of which token lies at each place (R * H * W); which places are padding,
        where the first one lies again; the place of each head of each token (tokens * H)."""
        if heads not in self._index:
            widths = [width for rows, width in self._blocks for _ in range(rows)]
            row = torch.arange(self.rows).repeat_interleave(torch.tensor(widths))
            column = torch.cat([torch.arange(width) for width in widths])
            back = ((row[:, None] * heads + torch.arange(heads)) * self.width + column[:, None]).flatten()
            there = torch.full((self.rows * heads * self.width,), -1)
            there[back] = torch.arange(len(back))
            self._index[heads] = there.clamp(min=0), (there < 0).nonzero().squeeze(1), back
        return self._index[heads]


class _LaidOut(torch.autograd.Function):
    """(tokens, H, D) -> (R, H, W, D); what lies in the padding does not matter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tile: Tile) -> Tensor:
        ctx.tile = tile
        there, _, _ = tile.index(x.shape[1])
        return x.reshape(-1, x.shape[2]).index_select(0, there).view(tile.rows, x.shape[1], tile.width, x.shape[2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        return _without_padding(slope, ctx.tile), None


class _TakenBack(torch.autograd.Function):
    """(R, H, W, D) -> (tokens, H, D); padding gets no slope."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tile: Tile) -> Tensor:
        ctx.tile = tile
        return _without_padding(x, tile)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        _, heads, size = slope.shape
        there, padding, _ = ctx.tile.index(heads)
        laid_out = slope.reshape(-1, size).index_select(0, there).index_fill_(0, padding, 0)
        return laid_out.view(ctx.tile.rows, heads, ctx.tile.width, size), None


def _without_padding(x: Tensor, tile: Tile) -> Tensor:
    _, heads, _, size = x.shape
    return x.reshape(-1, size).index_select(0, tile.index(heads)[2]).view(tile.tokens, heads, size)


class Layout:
    """The blocks of packed sequences, on their way to attention; ``masks`` say what each token of a block's rows sees,
    (R, 1, W, W) bool a block; None: the tokens before it and itself. Tokens behind the last block see nothing: 0.
    ``positions`` (R, W) of each block tell how far tokens are apart; None: as far as their columns.

    An object, for torch.compile would compile a layer anew for each tuple of blocks that it is called with."""

    def __init__(
        self,
        blocks: Sequence[Block],
        masks: Sequence[Tensor] | None = None,
        positions: Sequence[Tensor] | None = None,
    ) -> None:
        self.blocks, self.masks, self.positions = blocks, masks, positions
        self._tiles: dict[tuple[int | None, int], list[Tile]] = {}
        self._within: dict[int, Layout] = {}

    def within(self, window: int | None, device: torch.device) -> Layout:
        """The same where each token sees itself and the ``window`` - 1 before it alone; None: all before it."""
        if window is None or window >= max(width for _, width in self.blocks):
            return self
        if window not in self._within:
            masks = self.masks or [torch.ones(w, w, dtype=torch.bool, device=device).tril() for _, w in self.blocks]
            places = self.positions or [torch.arange(w, device=device).expand(r, w) for r, w in self.blocks]
            near = [place[:, None, :, None] - place[:, None, None, :] < window for place in places]
            self._within[window] = Layout(self.blocks, [mask & close for mask, close in zip(masks, near)])
        return self._within[window]

    def tiles(self, heads: int | None, multiple: int = 1) -> list[Tile]:
        """Blocks as batched products of so many ``heads`` are cheapest; None: each by itself. Widths are multiples."""
        kind = heads, multiple
        if kind not in self._tiles:
            runs = [(i, i + 1) for i in range(len(self.blocks))] if heads is None else self._cheapest(heads, multiple)
            self._tiles[kind] = [Tile(self.blocks[a:b], self.masks and self.masks[a:b], multiple) for a, b in runs]
        return self._tiles[kind]

    def _cheapest(self, heads: int, multiple: int) -> list[tuple[int, int]]:
        rows, widths = np.array(self.blocks).T
        widths = _up_to(multiple, widths)

        def cost(end: int) -> np.ndarray:
            rows_from = rows[:end][::-1].cumsum()[::-1]
            widest = np.maximum.accumulate(widths[:end][::-1])[::-1]
            return TILE + heads * rows_from * widest**2

        return cheapest_runs(len(rows), cost)


def _up_to(multiple: int, size: Any) -> Any:
    return -(-size // multiple) * multiple


class _Batched(torch.autograd.Function):
    """softmax(q k^T scale + bias) v (arXiv:1706.03762, eq. 1), and its derivatives.

    Of 16-bit numbers scores and softmax are float32, as in PyTorch's kernels; other products are in float32, too, where
    the tile is small."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
        """(R, H, W, D) each -> (R, H, W, D) in the precision of ``value``."""
        rows, heads, width, _ = query.shape
        wide = torch.promote_types(value.dtype, torch.float32)
        narrow = value.dtype if rows * width >= NARROW_FROM else wide
        q, k, v = (x.reshape(-1, *x.shape[2:]) for x in (query, key, value))
        scores = q.new_empty(rows, heads, width, width, dtype=wide).copy_(bias).flatten(0, 1)
        weights = scores.baddbmm_(q.to(wide), k.to(wide).transpose(1, 2), alpha=scale).softmax(-1).to(narrow)
        q, k, v = (x.to(narrow) for x in (q, k, v))
        ctx.save_for_backward(q, k, v, weights)
        ctx.scale, ctx.dtypes = scale, [x.dtype for x in (query, key, value)]
        return weights.bmm(v).to(value.dtype).view(value.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        of_attended = slope.to(v.dtype).reshape(v.shape)
        with torch.autocast("cpu", enabled=False):
            of_v = weights.transpose(1, 2).bmm(of_attended)
            of_weights = of_attended.bmm(v.transpose(1, 2))
            of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            of_q = of_scores.bmm(k).mul_(ctx.scale)
            of_k = of_scores.transpose(1, 2).bmm(q).mul_(ctx.scale)
        slopes = (x.view(slope.shape).to(dtype) for x, dtype in zip((of_q, of_k, of_v), ctx.dtypes))
        return *slopes, None, None


def attend(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, dropout: float = 0.0, batched: bool = True
) -> Tensor:
    """(T, Hq, D) from queries, and keys and values (T, Hkv, D), each block by itself, in the precision of ``value``.

    ``batched``: by products of whole tiles where that is faster; else by PyTorch's scaled dot-product attention."""
    on, dtype, groups = query.device.type, value.dtype, query.shape[1] // key.shape[1]
    narrow, threads = dtype in (torch.bfloat16, torch.float16), torch.get_num_threads()
    fits = on in ("cpu", "meta") and not dropout and max(width for _, width in layout.blocks) <= LONGEST
    batched = batched and fits and (threads > 1 or narrow)
    tiles = layout.tiles(query.shape[1], EVEN if narrow else 1) if batched else layout.tiles(None)
    if batched and threads == 1 and len(query) < NARROW_FROM * len(tiles):
        batched, tiles = False, layout.tiles(None)
    if batched and groups > 1:
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    elif narrow and on == "cpu" and not batched:
        query, key, value = query.float(), key.float(), value.float()
    sizes = [tile.tokens for tile in tiles]
    if behind := len(query) - sum(sizes):
        sizes.append(behind)
    attended = []
    pieces = zip(*(x.split(sizes) for x in (query, key, value))) if len(sizes) > 1 else [(query, key, value)]
    for tile, piece in zip(tiles, pieces):
        q, k, v = (tile.laid_out(x) for x in piece)
        if batched:
            out = _Batched.apply(q, k, v, tile.bias, scale)
        else:
            out = F.scaled_dot_product_attention(
                q, k, v, tile.mask, dropout, is_causal=tile.mask is None, scale=scale, enable_gqa=groups > 1
            )
        attended.append(tile.taken_back(out))
    if behind:
        attended.append(attended[0].new_zeros(behind, *query.shape[1:]))
    return (torch.cat(attended) if len(attended) > 1 else attended[0]).to(dtype)


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

    With a ``layout`` B is 1. Raises ``NotImplementedError`` where it would have to be computed in another way."""
    rows, _, length, size = query.shape
    on_cpu, dtype = query.device.type == "cpu", value.dtype
    special = {name for name, value in settings.items() if value is not None and value is not False} - USUAL
    if layout is not None and (special or not getattr(module, "is_causal", True)):
        raise NotImplementedError(f"attention takes {', '.join(sorted(special)) or 'what is ahead into account'}")
    causal = attention_mask is None and getattr(module, "is_causal", True) and not special
    if layout is None and causal and length == key.shape[2] > 1:
        layout = Layout([Block(rows, length)])
    with torch.autocast("cpu", enabled=False) if on_cpu else nullcontext():
        if layout is not None:
            layout = layout.within(settings.get("sliding_window"), query.device)
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
    """Whether all layers of ``model`` are attention to what stands before a token, all of it or within a window, whose
    parts are given as arguments, so that it may be ours."""
    text = model.config.get_text_config()
    return (
        model.config._attn_implementation in SDPA
        and type(model)._supports_attention_backend
        and type(model)._supports_flash_attn  # it gets no mask: what a token does not see is said by arguments
        and not type(model)._is_stateful  # layers of other kinds than attention carry on from token to token
        and set(getattr(text, "layer_types", None) or []) <= {"full_attention", "sliding_attention"}
    )


def has_window(model: PreTrainedModel) -> bool:
    """Whether tokens of some layers see those within a window alone."""
    text = model.config.get_text_config()
    return getattr(text, "sliding_window", None) is not None or "sliding_attention" in (
        getattr(text, "layer_types", None) or []
    )
