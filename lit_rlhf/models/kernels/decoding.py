"""Decoding by a :class:`ForwardPass`, with keys and values in one tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lit_rlhf.models.kernels.attention import Layout, attend
from lit_rlhf.models.kernels.forward_pass import ForwardPass
from lit_rlhf.text.packing import Packed, pack


class CachedDecoder:
    """Runs a :class:`ForwardPass`; keys and values lie in one tensor that is made once and written in place.

    Texts end in the same column, padding before them is masked: a text that begins later lies further right."""

    joins = True

    def __init__(self, model: ForwardPass, rows: int, width: int) -> None:
        self.model, self.width = model, width
        # (layer, key or value, row, head, column, D)
        shape = len(model.layers), 2, rows, model.kv_heads, width, model.head_size
        self.cache = torch.empty(shape, dtype=model.dtype, device=model.device)
        self.starts = torch.zeros(rows, dtype=torch.int64, device=model.device)
        self.alive, self.end = 0, 0  # rows in use, columns in use
        # 0, or -inf at the padding of a row; used once there is any
        self.bias = torch.zeros(rows, model.kv_heads, 1, width, dtype=model.dtype, device=model.device)
        self.padded = False

    def begin(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        longest = max(map(len, prompts))
        if self.alive == 0:
            self.end = longest
        elif self.end < longest:
            self._shift(longest - self.end)
        unique = list(dict.fromkeys(map(tuple, prompts)))
        packed = pack(unique, 0).to(self.model.device)
        which = {prompt: i for i, prompt in enumerate(unique)}
        source = torch.tensor([which[tuple(prompt)] for prompt in prompts], device=self.model.device)
        lengths = packed.lengths[source]
        rows = torch.arange(len(prompts), device=self.model.device) + self.alive
        # What lies before a text is masked, and yet a NaN there would spoil a sum.
        self.cache[:, :, self.alive : self.alive + len(prompts), :, : self.end].zero_()
        self.starts[rows] = self.end - lengths
        # Where each token of each prompt lies among the packed ones, and where its keys and values go.
        steps = torch.arange(longest, device=self.model.device)
        there = steps < lengths[:, None]
        token = (packed.starts[source][:, None] + steps)[there]
        row = rows[:, None].expand_as(there)[there]
        column = (self.starts[rows][:, None] + steps)[there]

        def keep(layer: int, kv: Tensor) -> None:
            self.cache[layer].transpose(0, 1)[row, :, :, column] = kv[token]

        hidden = self.read(packed, keep)
        self._mask(rows)
        self.alive += len(prompts)
        return hidden[source]

    def read(self, packed: Packed, keep: Callable[[int, Tensor], None]) -> Tensor:
        """Last hidden state (N, E) of each packed prompt; ``keep`` gets each layer's keys and values (T, 2, Hkv, D)."""

        layout = Layout(packed.blocks)

        def within(layer: int, queries: Tensor, kv: Tensor) -> Tensor:
            keep(layer, kv)
            return attend(queries, kv[:, 0], kv[:, 1], layout, scale=1.0).flatten(1)

        return self.model(packed.tokens, packed.positions, within, packed.ends)

    def step(self, tokens: Tensor) -> Tensor:
        alive, end = self.alive, self._next_column()
        group = self.model.query_heads // self.model.kv_heads
        bias = self.bias[:alive, ..., : end + 1].flatten(0, 1)

        def attend(layer: int, queries: Tensor, kv: Tensor) -> Tensor:
            cache = self.cache[layer, :, :alive]
            cache[..., end, :] = kv.transpose(0, 1)
            keys, values = cache[..., : end + 1, :].flatten(1, 2)
            q = queries.reshape(alive * self.model.kv_heads, group, -1)
            scores = torch.baddbmm(bias, q, keys.transpose(1, 2)) if self.padded else torch.bmm(q, keys.transpose(1, 2))
            return torch.bmm(scores.softmax(-1), values).view(alive, -1)

        return self.model(tokens, end - self.starts[:alive], attend)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.head(hidden)

    def keep(self, rows: Tensor) -> None:
        self.alive = len(rows)
        to = (rows != torch.arange(self.alive, device=rows.device)).nonzero().squeeze(1)
        held = self.cache[..., : self.end, :]
        for x, dim in ((held, 2), (self.starts, 0), (self.bias, 0)):
            x.index_copy_(dim, to, x.index_select(dim, rows[to]))

    def _next_column(self) -> int:
        """Where the keys and values of the next tokens go."""
        if self.end == self.width:  # texts that began early have ended
            self._shift(-int(self.starts[: self.alive].min()))
        self.end += 1
        return self.end - 1

    def _shift(self, columns: int) -> None:
        """Move all that is held to the right, or, where that is negative, to the left."""
        to = slice(max(0, columns), self.end + columns)
        source = slice(max(0, -columns), self.end)
        for held in self.cache[:, :, : self.alive]:  # layer by layer: what is moved is there twice meanwhile
            held[..., to, :] = held[..., source, :].clone()
        self.starts[: self.alive] += columns
        self.end += columns
        self._mask(torch.arange(self.alive, device=self.starts.device))

    def _mask(self, rows: Tensor) -> None:
        padding = torch.arange(self.width, device=rows.device) < self.starts[rows, None]
        bias = torch.zeros(padding.shape, dtype=self.bias.dtype, device=rows.device).masked_fill_(padding, -torch.inf)
        self.bias[rows] = bias[:, None, None]
        self.padded = self.padded or bool(padding.any())


class StaticDecoder(CachedDecoder):
    """Takes the same steps in shapes that do not grow, so that a GPU can replay one as a CUDA graph.

    A step sees the whole width, with what is not written yet masked, and as many rows as the next power of two; a graph
    is captured when one of so many rows is first needed. On a CPU the steps run as they are."""

    def __init__(self, model: ForwardPass, rows: int, width: int) -> None:
        super().__init__(model, rows, width)
        self.cache.zero_()  # a step sees what is not written yet, too: masked, but a NaN there would spoil a sum
        self.tokens = torch.zeros_like(self.starts)
        self.column = torch.zeros(1, dtype=torch.int64, device=model.device)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}  # rows -> (a step, where its result lies)
        self.pool: Any = None  # memory that the graphs share: they never run at once

    def step(self, tokens: Tensor) -> Tensor:
        self.column.fill_(self._next_column())
        self.tokens[: self.alive] = tokens
        rows = min(1 << (self.alive - 1).bit_length(), len(self.starts))
        if self.tokens.device.type != "cuda":
            return self._run(rows)[: self.alive]
        if rows not in self.graphs:
            self.graphs[rows] = self._capture(rows)
        graph, hidden = self.graphs[rows]
        graph.replay()
        return hidden[: self.alive]

    def _capture(self, rows: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        # What a library sets up at its first call must not be captured. Doing a step twice writes the same twice.
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._run(rows)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            hidden = self._run(rows)
        self.pool = graph.pool()
        return graph, hidden

    def _run(self, rows: int) -> Tensor:
        group = self.model.query_heads // self.model.kv_heads
        # In rows that are not in use, too: no softmax is empty, and nobody reads what comes of them.
        bias = self.bias[:rows].index_fill_(-1, self.column, 0.0).flatten(0, 1)

        def attend(layer: int, queries: Tensor, kv: Tensor) -> Tensor:
            cache = self.cache[layer, :, :rows]
            cache.index_copy_(3, self.column, kv.transpose(0, 1).unsqueeze(3))
            keys, values = cache.flatten(1, 2)
            scores = torch.baddbmm(bias, queries.reshape(rows * self.model.kv_heads, group, -1), keys.transpose(1, 2))
            return torch.bmm(scores.softmax(-1), values).view(rows, -1)

        positions = (self.column - self.starts[:rows]).clamp_(0, self.width - 1)
        return self.model(self.tokens[:rows], positions, attend)

    def _mask(self, rows: Tensor) -> None:
        super()._mask(rows)
        self.bias[..., self.end :] = -torch.inf
