"""Sequences laid one after another, without padding.

Sequences of about one length stand together as the rows of a block: everything but attention computes them as one long
row, and attention takes block by block, so that a sequence sees itself alone. Where several sequences answer one
prompt, the prompt can be laid down once, with the answers behind it: each answer sees the prompt and itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

Part = TypeVar("Part", list[int], range)

# What a block costs, in tokens: attention is called once for each, and on an accelerator calls are what costs.
BLOCK = 256 if torch.accelerator.is_available() else 4
ATTENTION = 1000  # in a row of so many tokens, about, attention costs a small model as much as all else


class Block(NamedTuple):
    """Rows of one width."""

    rows: int
    width: int  # tokens of a row; padding ends those that are shorter


class Packed(NamedTuple):
    """N sequences in T tokens."""

    tokens: Tensor  # (T,) int64
    positions: Tensor  # (T,) int64, 0 at the start of each sequence; 0 for padding
    blocks: tuple[Block, ...]  # one after another, of T tokens together
    starts: Tensor  # (N,) int64, where each sequence begins
    lengths: Tensor  # (N,) int64
    response_lengths: Tensor | None = None  # (N,) int64, from the first response token to the end; None: not said
    response_mask: Tensor | None = None  # (T,) bool, True = token of a response; None: all of those are
    # Only where prompts are shared:
    response_starts: Tensor | None = None  # (N,) int64, where each response begins; else it follows its prompt
    parts: Tensor | None = None  # (T,) int64, a number for each prompt and each response
    after: Tensor | None = None  # (T,) int64, the part that a token's own part goes on from; itself: none

    @property
    def ends(self) -> Tensor:
        """Index (N,) of each sequence's last token."""
        if self.response_starts is None or self.response_lengths is None:
            return self.starts + self.lengths - 1
        return self.response_starts + self.response_lengths - 1

    @property
    def visible(self) -> list[Tensor] | None:
        """Attention masks, (R, 1, W, W) bool of each block; None: each those before it."""
        if self.parts is None or self.after is None:
            return None
        return [_visible(*parts) for parts in zip(self.by_block(self.parts), self.by_block(self.after))]

    def by_block(self, x: Tensor) -> list[Tensor]:
        """(T, ...) as (R, W, ...) of each block."""
        pieces = torch.split(x, [rows * width for rows, width in self.blocks])
        return [piece.view(*block, *x.shape[1:]) for piece, block in zip(pieces, self.blocks)]

    def from_end(self, back: Tensor) -> Tensor:
        """Indices (N, S) of the tokens that stand ``back`` (N, S) places before the last one of each sequence."""
        flat = self.ends[:, None] - back
        if self.response_starts is None or self.response_lengths is None:
            return flat
        in_prompt = back - self.response_lengths[:, None]
        prompt_ends = self.starts + self.lengths - self.response_lengths - 1
        return torch.where(in_prompt >= 0, prompt_ends[:, None] - in_prompt, flat)

    def to(self, device: torch.device) -> Packed:
        """The packed sequences on another device."""
        moved: dict[str, Any] = {k: x.to(device) for k, x in self._asdict().items() if isinstance(x, Tensor)}
        return self._replace(**moved)


def _visible(parts: Tensor, after: Tensor) -> Tensor:
    here, there = parts[:, None, :, None], parts[:, None, None, :]
    seen = (here == there) | (after[:, None, :, None] == there)
    return seen & torch.ones(seen.shape[-2:], dtype=torch.bool, device=seen.device).tril()


def pack(
    sequences: Sequence[Sequence[int]],
    pad_id: int,
    response_lengths: Sequence[int] | None = None,
    share_prompts: bool = False,
    padded: bool = False,
    response_masks: Sequence[Sequence[bool]] | None = None,
) -> Packed:
    """Lay ``sequences`` (each of one token or more) into blocks, longest first.

    ``response_lengths`` says how many tokens at the end of each sequence answer what stands before them; or
    ``response_masks``, one bool per token, says which tokens do, where a sequence has several responses.
    ``share_prompts`` lays down once a prompt that several sequences begin with. ``padded`` makes one block of all,
    each sequence padded to the longest."""
    lengths = [len(s) for s in sequences]
    if response_masks is not None:
        response_lengths = [len(mask) - mask.index(True) for mask in response_masks]
        if all(all(mask[-n:]) for mask, n in zip(response_masks, response_lengths)):
            response_masks = None  # one response each, which ends the sequence
    groups = [[i] for i in range(len(sequences))]
    if share_prompts and response_lengths is not None and not padded:
        groups = list(_sharing(sequences, response_lengths))
    shared = any(len(group) > 1 for group in groups)
    prompts = [0] * len(groups)
    if shared and response_lengths is not None:
        prompts = [lengths[group[0]] - response_lengths[group[0]] for group in groups]
    sizes = np.array([prompt + sum(lengths[i] - prompt for i in group) for prompt, group in zip(prompts, groups)])
    order = np.argsort(-sizes, kind="stable")
    blocks = [Block(len(sizes), int(sizes.max()))] if padded else _blocks(sizes[order])
    widths = np.repeat([b.width for b in blocks], [b.rows for b in blocks])
    begins = np.empty_like(widths)
    begins[order] = widths.cumsum() - widths
    starts, response_starts = [0] * len(sequences), [0] * len(sequences)
    parts: list[_Part] = []
    for begin, prompt, group in zip(begins.tolist(), prompts, groups):
        base, place = len(parts), begin + prompt
        if shared:
            parts.append(_Part(sequences[group[0]][:prompt], [False] * prompt, begin, 0, base))
        for i in group:
            starts[i], response_starts[i] = begin, place
            written = () if response_masks is None else response_masks[i][prompt:]
            parts.append(_Part(sequences[i][prompt:], written, place, prompt, base))
            place += lengths[i] - prompt
    tokens, positions, mask, numbers, after = _laid_down(parts, int(widths.sum()), pad_id, response_masks is not None)
    return Packed(
        tokens,
        positions,
        tuple(blocks),
        torch.tensor(starts),
        torch.tensor(lengths),
        None if response_lengths is None else torch.tensor(response_lengths),
        None if response_masks is None else mask,
        *((torch.tensor(response_starts), numbers, after) if shared else ()),
    )


class _Part(NamedTuple):
    """A sequence; or, where prompts are shared, a prompt or a response."""

    tokens: Sequence[int]
    written: Sequence[bool]  # which of them are a response's, where masks say so
    place: int
    first: int  # position of its first token
    base: int  # number of its prompt's part


def _laid_down(parts: Sequence[_Part], size: int, pad_id: int, masked: bool) -> Iterator[Tensor]:
    """Tokens, positions, response mask, number of the part and of the part before it, (size,) each."""
    # A batch has thousands of tokens: they are laid down by whole arrays, not by Python token by token.
    pieces, written, places, firsts, bases = zip(*parts)
    counts = np.array([len(piece) for piece in pieces])
    within = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    spots = np.repeat(places, counts) + within
    tokens, positions, mask = np.full(size, pad_id), np.zeros(size, np.int64), np.zeros(size, bool)
    tokens[spots] = _flat(pieces, len(spots))
    positions[spots] = np.repeat(firsts, counts) + within
    if masked:
        mask[spots] = _flat(written, len(spots))
    numbers, after = np.full((2, size), -1)
    numbers[spots], after[spots] = np.repeat(np.arange(len(parts)), counts), np.repeat(bases, counts)
    return map(torch.from_numpy, (tokens, positions, mask, numbers, after))


def _blocks(sizes: np.ndarray) -> list[Block]:
    """The cheapest way to cut ``sizes`` (N,), which fall, into blocks: padding costs, and a block costs."""
    # A block is as wide as its first.
    runs = cheapest_runs(len(sizes), lambda end: BLOCK + sizes[:end] * (end - np.arange(end)))
    return [Block(end - begin, int(sizes[begin])) for begin, end in runs]


def cheapest_runs(count: int, cost: Callable[[int], np.ndarray]) -> list[tuple[int, int]]:
    """Cuts ``range(count)`` into runs [begin, end) of least total cost; ``cost(end)`` (end,) says what each run costs
    that ends there, by where it begins."""
    costs, cuts = np.zeros(count + 1), [0]
    for end in range(1, count + 1):
        total = costs[:end] + cost(end)
        cuts.append(int(total.argmin()))
        costs[end] = total[cuts[-1]]
    runs, end = [], count
    while end:
        runs.append((cuts[end], end))
        end = cuts[end]
    return runs[::-1]


def _sharing(sequences: Sequence[Sequence[int]], response_lengths: Sequence[int]) -> Iterator[list[int]]:
    """Sequences that begin with the same prompt, as many together as make an answer cheapest.

    k answers of a tokens behind a prompt of p cost (p + ka)(1 + (p + ka) / ATTENTION), so one of them costs least where
    ka is the geometric mean of p and p + ATTENTION."""
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for i, (sequence, n) in enumerate(zip(sequences, response_lengths)):
        by_prompt.setdefault(tuple(sequence[: len(sequence) - n]), []).append(i)
    for prompt, members in by_prompt.items():
        room = math.sqrt(len(prompt) * (len(prompt) + ATTENTION))
        group: list[int] = []
        size = 0
        for i in members:
            if group and size + response_lengths[i] > room:
                yield group
                group, size = [], 0
            group.append(i)
            size += response_lengths[i]
        yield group


def runs(
    lengths: Sequence[int], tokens: int, most: int | None = None, shared: Sequence[int] | None = None
) -> list[slice]:
    """Cuts sequences of these ``lengths`` into runs of at most so many ``tokens``, and of ``most`` sequences; one that
    is longer stands alone.

    ``shared``: tokens of each sequence that are laid down already where the one before it is in the same run."""
    begins, held = [0], 0
    for i, length in enumerate(lengths):
        more = length if shared is None else length - shared[i]
        if held and (held + more > tokens or i - begins[-1] == most):
            begins.append(i)
            held = 0
        held += more if held else length
    return [slice(begin, end) for begin, end in zip(begins, [*begins[1:], len(lengths)])]


def divided(parts: list[Part], count: int) -> list[Part]:
    """``parts``, lists or ranges, of which the longest is halved until there are ``count``; their order stays."""
    parts = list(parts)
    while len(parts) < count:
        i = max(range(len(parts)), key=lambda i: len(parts[i]))
        half = len(parts[i]) // 2
        parts[i : i + 1] = [parts[i][:half], parts[i][half:]]
    return parts


def _flat(sequences: Sequence[Sequence[int]], count: int) -> np.ndarray:
    """All tokens one after the other, (count,) int64."""
    return np.fromiter(chain.from_iterable(sequences), np.int64, count)


def stream(documents: Sequence[Sequence[int]], end_of_text: int) -> Tensor:
    """All documents one after the other, (N,) int32, end-of-text after each."""
    return torch.tensor([token for document in documents for token in (*document, end_of_text)], dtype=torch.int32)


def left_pad(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """(tokens, mask), both (B, P): padded on the left so that every answer starts in the same column."""
    lengths = np.array([len(s) for s in sequences])
    width = int(lengths.max())
    mask = np.arange(width) >= width - lengths[:, None]
    tokens = np.full(mask.shape, pad_id)
    tokens[mask] = _flat(sequences, int(lengths.sum()))
    return torch.from_numpy(tokens), torch.from_numpy(mask)
