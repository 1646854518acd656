"""Sequences laid into rows without padding.

Sequences of one row are kept apart by their position ids, which start again at 0 with each of them: attention is
block-diagonal, so each sequence sees what it would see alone."""

from __future__ import annotations

from collections.abc import Sequence
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

    @property
    def ends(self) -> Tensor:
        """Flat index (N,) of each sequence's last token."""
        return self.starts + self.lengths - 1

    def to(self, device: torch.device) -> Packed:
        """The same on another device."""
        return Packed(*(None if tensor is None else tensor.to(device) for tensor in self))


def pack(
    sequences: Sequence[Sequence[int]],
    pad_id: int,
    row_length: int | None = 128,
    response_lengths: Sequence[int] | None = None,
) -> Packed:
    """Lay ``sequences`` (each of one token or more) into rows, longest first, each where it first fits.

    A row is as long as the longest sequence where that is longer than ``row_length``; None gives each a row of its
    own. ``response_lengths`` says how many tokens at the end of each sequence answer what stands before them."""
    lengths = [len(s) for s in sequences]
    alone = row_length is None
    row_length = max(lengths) if row_length is None else max(min(row_length, sum(lengths)), max(lengths))
    free: list[int] = []
    place: list[tuple[int, int]] = [(0, 0)] * len(sequences)
    for i in sorted(range(len(sequences)), key=lambda i: -lengths[i]):
        row = None if alone else next((r for r, room in enumerate(free) if room >= lengths[i]), None)
        if row is None:
            row = len(free)
            free.append(row_length)
        place[i] = (row, row_length - free[row])
        free[row] -= lengths[i]
    # A batch has thousands of tokens: they are laid down by whole arrays, not by Python token by token.
    room, sizes = np.array(free), np.array(lengths)
    starts = np.array([row * row_length + column for row, column in place])
    within = np.arange(sizes.sum()) - np.repeat(sizes.cumsum() - sizes, sizes)
    spots = np.repeat(starts, sizes) + within
    tokens = np.full(len(free) * row_length, pad_id)
    positions = (np.arange(row_length) - (row_length - room)[:, None]).clip(0).ravel()
    tokens[spots], positions[spots] = _flat(sequences, len(spots)), within
    shape = (len(free), row_length)
    return Packed(
        torch.from_numpy(tokens).view(shape),
        torch.from_numpy(positions).view(shape),
        torch.from_numpy(starts),
        torch.from_numpy(sizes),
        None if response_lengths is None else torch.tensor(response_lengths),
    )


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
