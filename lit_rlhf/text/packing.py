"""Sequences laid into rows without padding.

Sequences of one row are kept apart by their position ids, which start again at 0 with each of them: attention is
block-diagonal, so each sequence sees what it would see alone. Where several sequences answer one prompt, the prompt can
be laid down once, with the answers behind it: each answer sees the prompt and itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

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

    A row is as long as the longest sequence where that is longer than ``row_length``; None gives each a row of its
    own. ``response_lengths`` says how many tokens at the end of each sequence answer what stands before them.
    ``share_prompts`` lays down a prompt that several sequences of a row begin with once."""
    lengths = [len(s) for s in sequences]
    alone = row_length is None
    limit = max(lengths) if row_length is None else max(row_length, max(lengths))
    groups = [[i] for i in range(len(sequences))]
    if share_prompts and response_lengths is not None and not alone:
        groups = list(_sharing(sequences, response_lengths, limit))
    shared = any(len(group) > 1 for group in groups)
    prompts = [lengths[g[0]] - response_lengths[g[0]] if shared else 0 for g in groups]
    sizes = [prompt + sum(lengths[i] - prompt for i in group) for prompt, group in zip(prompts, groups)]
    row_length = limit if alone else max(min(row_length, sum(sizes)), max(sizes))
    free: list[int] = []
    starts, response_starts = [0] * len(sequences), [0] * len(sequences)
    rows: list[list[int]] = []
    positions: list[list[int]] = []
    parts: list[list[int]] = []
    after: list[list[int]] = []
    number = 0

    def lay(row: int, tokens: Sequence[int], position: int, goes_on_from: int | None) -> int:
        """A part at the end of a row; where it begins."""
        nonlocal number
        number += 1
        begin = row * row_length + len(rows[row])
        rows[row] += tokens
        positions[row].extend(range(position, position + len(tokens)))
        if shared:
            parts[row] += [number] * len(tokens)
            after[row] += [number if goes_on_from is None else goes_on_from] * len(tokens)
        free[row] -= len(tokens)
        return begin

    for g in sorted(range(len(groups)), key=lambda g: -sizes[g]):
        row = None if alone else next((r for r, room in enumerate(free) if room >= sizes[g]), None)
        if row is None:
            row = len(free)
            free.append(row_length)
            for table in (rows, positions, parts, after):
                table.append([])
        if not shared:
            [i] = groups[g]
            starts[i] = lay(row, sequences[i], 0, None)
            continue
        prompt = prompts[g]
        begin = lay(row, sequences[groups[g][0]][:prompt], 0, None)
        part = number
        for i in groups[g]:
            starts[i] = begin
            response_starts[i] = lay(row, sequences[i][prompt:], prompt, part)
    for row, room in enumerate(free):
        lay(row, [pad_id] * room, 0, None)
    return Packed(
        torch.tensor(rows),
        torch.tensor(positions),
        torch.tensor(starts),
        torch.tensor(lengths),
        None if response_lengths is None else torch.tensor(response_lengths),
        *(torch.tensor(table) if shared else None for table in (response_starts, parts, after)),
    )


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


def stream(documents: Sequence[Sequence[int]], end_of_text: int) -> Tensor:
    """All documents one after the other, (N,) int32, end-of-text after each."""
    return torch.tensor([token for document in documents for token in (*document, end_of_text)], dtype=torch.int32)


def left_pad(sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """(tokens, mask), both (B, P): padded on the left so that every answer starts in the same column."""
    width = max(map(len, sequences))
    tokens = torch.tensor([[pad_id] * (width - len(s)) + list(s) for s in sequences])
    mask = torch.tensor([[False] * (width - len(s)) + [True] * len(s) for s in sequences])
    return tokens, mask
