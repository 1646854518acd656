"""Sequences laid into rows without padding.

Sequences of one row are kept apart by their position ids, which start again at 0 with each of them: attention is
block-diagonal, so each sequence sees what it would see alone. Where several sequences answer one prompt, the prompt can
be laid down once, with the answers behind it: each answer sees the prompt and itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Packed(NamedTuple):
    """N sequences in R rows of L tokens."""

    tokens: Tensor  # (R, L) int64
    positions: Tensor  # (R, L) int64, 0 at the start of each sequence; padding at a row's end is a sequence of its own
    starts: Tensor  # (N,) int64, where each sequence begins in the flattened rows
    lengths: Tensor  # (N,) int64
    response_lengths: Tensor | None = None  # (N,) int64, tokens of the response that ends each sequence; None: not said
    # Only where prompts are shared:
    response_starts: Tensor | None = None  # (N,) int64, where each response begins; else it follows its prompt
    parts: Tensor | None = None  # (R, L) int64, a number for each prompt and each response of a row
    after: Tensor | None = None  # (R, L) int64, the part that a token's own part goes on from; itself: none

    @property
    def ends(self) -> Tensor:
        """Flat index (N,) of each sequence's last token."""
        if self.response_starts is None:
            return self.starts + self.lengths - 1
        return self.response_starts + self.response_lengths - 1

    @property
    def visible(self) -> Tensor | None:
        """Which tokens see which, (R, 1, L, L) bool; None: position ids say it."""
        if self.parts is None:
            return None
        here, there = self.parts[:, None, :, None], self.parts[:, None, None, :]
        seen = (here == there) | (self.after[:, None, :, None] == there)
        return seen & torch.ones(seen.shape[-2:], dtype=torch.bool, device=seen.device).tril()

    def from_end(self, back: Tensor) -> Tensor:
        """Flat indices (N, T) of the tokens that stand ``back`` (N, T) places before the last one of each sequence."""
        flat = self.ends[:, None] - back
        if self.response_starts is None:
            return flat
        in_prompt = back - self.response_lengths[:, None]
        prompt_ends = self.starts + self.lengths - self.response_lengths - 1
        return torch.where(in_prompt >= 0, prompt_ends[:, None] - in_prompt, flat)

    def to(self, device: torch.device) -> Packed:
        """The same on another device."""
        return Packed(*(None if tensor is None else tensor.to(device) for tensor in self))


def pack(
    sequences: Sequence[Sequence[int]],
    pad_id: int,
    row_length: int | None = 128,
    response_lengths: Sequence[int] | None = None,
    share_prompts: bool = False,
) -> Packed:
    """Lay ``sequences`` (each of one token or more) into rows, longest first, each where it first fits.

    A row has ``row_length`` tokens, or as many as the longest sequence where that is longer, or cheaper;
    None gives each a row of its own. ``response_lengths`` says how many tokens at the end of each sequence answer what
    stands before them. ``share_prompts`` lays down a prompt that several sequences of a row begin with once."""
    lengths = [len(s) for s in sequences]
    limit = max(lengths) if row_length is None else max(row_length, max(lengths))
    groups = [[i] for i in range(len(sequences))]
    if share_prompts and response_lengths is not None and row_length is not None:
        groups = list(_sharing(sequences, response_lengths, limit))
    shared = any(len(group) > 1 for group in groups)
    prompts = [lengths[g[0]] - response_lengths[g[0]] if shared else 0 for g in groups]
    sizes = [prompt + sum(lengths[i] - prompt for i in group) for prompt, group in zip(prompts, groups)]
    widths = [max(sizes)] if row_length is None else [max(sizes), max(min(row_length, sum(sizes)), max(sizes))]
    layouts = [_lay(sizes, width, alone=row_length is None) for width in widths]
    # Attention costs a token the more the longer its row is: as much as all else at about 6 times the model's width.
    width, free, begins = min(layouts, key=lambda layout: layout.width * len(layout.free) * (1 + layout.width / 1000))
    # Of what they consist: a group is a sequence, or a prompt and its responses.
    starts, response_starts = [0] * len(sequences), [0] * len(sequences)
    parts: list[tuple[Sequence[int], int, int, int]] = []  # tokens, place, first position, prompt's part
    for begin, prompt, group in zip(begins, prompts, groups):
        base, place = len(parts), begin + prompt
        if shared:
            parts.append((sequences[group[0]][:prompt], begin, 0, base))
        for i in group:
            starts[i], response_starts[i] = begin, place
            parts.append((sequences[i][prompt:], place, prompt, base))
            place += lengths[i] - prompt
    # A batch has thousands of tokens: they are laid down by whole arrays, not by Python token by token.
    pieces, places, firsts, bases = zip(*parts)
    counts = np.array([len(piece) for piece in pieces])
    within = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    spots = np.repeat(places, counts) + within
    tokens = np.full(len(free) * width, pad_id)
    tokens[spots] = _flat(pieces, len(spots))
    positions = (np.arange(width) - (width - np.array(free))[:, None]).clip(0).ravel()  # of the padding
    positions[spots] = np.repeat(firsts, counts) + within
    numbers, after = np.full((2, len(tokens)), -1)
    numbers[spots], after[spots] = np.repeat(np.arange(len(parts)), counts), np.repeat(bases, counts)

    def rows(flat: np.ndarray) -> Tensor:
        return torch.from_numpy(flat).view(len(free), width)

    return Packed(
        rows(tokens),
        rows(positions),
        torch.tensor(starts),
        torch.tensor(lengths),
        None if response_lengths is None else torch.tensor(response_lengths),
        *((torch.tensor(response_starts), rows(numbers), rows(after)) if shared else ()),
    )


class _Layout(NamedTuple):
    width: int  # tokens of a row
    free: list[int]  # tokens that are left of each row
    begins: list[int]  # flat indices


def _lay(sizes: Sequence[int], width: int, alone: bool) -> _Layout:
    """Where groups of tokens go: the longest first, each where it first fits, or each in a row ``alone``."""
    layout = _Layout(width, [], [0] * len(sizes))
    for g in sorted(range(len(sizes)), key=lambda g: -sizes[g]):
        row = None if alone else next((r for r, room in enumerate(layout.free) if room >= sizes[g]), None)
        if row is None:
            row = len(layout.free)
            layout.free.append(width)
        layout.begins[g] = row * width + width - layout.free[row]
        layout.free[row] -= sizes[g]
    return layout


def _sharing(
    sequences: Sequence[Sequence[int]], response_lengths: Sequence[int], row_length: int
) -> Iterator[list[int]]:
    """Sequences that begin with the same prompt, as many together as fit into a row."""
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for i, (sequence, n) in enumerate(zip(sequences, response_lengths)):
        by_prompt.setdefault(tuple(sequence[: len(sequence) - n]), []).append(i)
    for prompt, members in by_prompt.items():
        group, size = [], len(prompt)
        for i in members:
            if group and (size + response_lengths[i] > row_length or not prompt):
                yield group
                group, size = [], len(prompt)
            group.append(i)
            size += response_lengths[i]
        yield group


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
