"""What reads prompts and goes on with them token by token, keeping keys and values."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from lit_rlhf.functional import position_ids
from lit_rlhf.models.attention import Layout, attend, has_window, sees_before_it
from lit_rlhf.models.logits import next_token_logits
from lit_rlhf.models.policy import packed_hidden
from lit_rlhf.models.self_check import SHORTER, read, texts
from lit_rlhf.rollouts.trunk import Trunk
from lit_rlhf.text.packing import Packed, left_pad, pack


class Decoder(Protocol):
    """Texts that are being written, one a row."""

    joins: bool  # whether texts can begin while others are being written

    def begin(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Add a row for each of n prompts behind those there are; their last hidden states (n, E)."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """The next token (A,) of each row; the hidden states (A, E) that it leads to."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Of the next token, (A, V), from hidden states (A, E)."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Only ``rows`` (int64) go on, in this order."""
        ...


class LeanDecoder:
    """Runs a :class:`Trunk`; keys and values lie in one tensor that is made once and written in place.

    Texts end in the same column, padding before them is masked: a text that begins later lies further right."""

    joins = True

    def __init__(self, trunk: Trunk, rows: int, width: int) -> None:
        self.trunk, self.width = trunk, width
        # (layer, key or value, row, head, column, D)
        shape = len(trunk.layers), 2, rows, trunk.kv_heads, self.columns(width), trunk.head_size
        self.cache = torch.empty(shape, dtype=trunk.dtype, device=trunk.device)
        self.starts = torch.zeros(rows, dtype=torch.int64, device=trunk.device)
        self.alive, self.end = 0, 0  # rows in use, columns in use
        # 0, or -inf at the padding of a row; used once there is any
        self.bias = torch.zeros(rows, trunk.kv_heads, 1, width, dtype=trunk.dtype, device=trunk.device)
        self.padded = False

    @staticmethod
    def columns(width: int) -> int:
        """So many that the next batch's cache fits into the memory that this one's has left. An odd number: were heads
        whole pages apart, their keys would crowd a few lines of the processor's cache."""
        return -(-width // 32) * 32 + 1

    def begin(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        longest = max(map(len, prompts))
        if self.alive == 0:
            self.end = longest
        elif self.end < longest:
            self._shift(longest - self.end)
        unique = list(dict.fromkeys(map(tuple, prompts)))
        packed = pack(unique, 0).to(self.trunk.device)
        which = {prompt: i for i, prompt in enumerate(unique)}
        source = torch.tensor([which[tuple(prompt)] for prompt in prompts], device=self.trunk.device)
        lengths = packed.lengths[source]
        rows = torch.arange(len(prompts), device=self.trunk.device) + self.alive
        # What lies before a text is masked, and yet a NaN there would spoil a sum.
        self.cache[:, :, self.alive : self.alive + len(prompts), :, : self.end].zero_()
        self.starts[rows] = self.end - lengths
        # Where each token of each prompt lies among the packed ones, and where its keys and values go.
        steps = torch.arange(longest, device=self.trunk.device)
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
            return attend(queries, *kv.unbind(1), layout, scale=1.0).flatten(1)

        return self.trunk(packed.tokens, packed.positions, within, packed.ends)

    def step(self, tokens: Tensor) -> Tensor:
        alive, end = self.alive, self._next_column()
        group = self.trunk.query_heads // self.trunk.kv_heads
        bias = self.bias[:alive, ..., : end + 1].flatten(0, 1)

        def attend(layer: int, queries: Tensor, kv: Tensor) -> Tensor:
            cache = self.cache[layer, :, :alive]
            cache[..., end, :] = kv.transpose(0, 1)
            keys, values = cache[..., : end + 1, :].flatten(1, 2)
            q = queries.reshape(alive * self.trunk.kv_heads, group, -1)
            scores = torch.baddbmm(bias, q, keys.transpose(1, 2)) if self.padded else torch.bmm(q, keys.transpose(1, 2))
            return torch.bmm(scores.softmax(-1), values).view(alive, -1)

        return self.trunk(tokens, end - self.starts[:alive], attend)

    def logits(self, hidden: Tensor) -> Tensor:
        return self.trunk.head(hidden)

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


class StaticDecoder(LeanDecoder):
    """Takes the same steps in shapes that do not grow, so that a GPU can replay one as a CUDA graph.

    A step sees the whole width, with what is not written yet masked, and as many rows as the next power of two; a graph
    is captured when one of so many rows is first needed. On a CPU the steps run as they are."""

    def __init__(self, trunk: Trunk, rows: int, width: int) -> None:
        super().__init__(trunk, rows, width)
        self.cache.zero_()  # a step sees what is not written yet, too: masked, but a NaN there would spoil a sum
        self.tokens = torch.zeros_like(self.starts)
        self.column = torch.zeros(1, dtype=torch.int64, device=trunk.device)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}  # rows -> (a step, where its result lies)
        self.pool: Any = None  # memory that the graphs share: they never run at once

    @staticmethod
    def columns(width: int) -> int:
        """No more: all of them are looked at."""
        return width

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
        stream = torch.cuda.Stream()
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
        group = self.trunk.query_heads // self.trunk.kv_heads
        # In rows that are not in use, too: no softmax is empty, and nobody reads what comes of them.
        bias = self.bias[:rows].index_fill_(-1, self.column, 0.0).flatten(0, 1)

        def attend(layer: int, queries: Tensor, kv: Tensor) -> Tensor:
            cache = self.cache[layer, :, :rows]
            cache.index_copy_(3, self.column, kv.transpose(0, 1).unsqueeze(3))
            keys, values = cache.flatten(1, 2)
            scores = torch.baddbmm(bias, queries.reshape(rows * self.trunk.kv_heads, group, -1), keys.transpose(1, 2))
            return torch.bmm(scores.softmax(-1), values).view(rows, -1)

        positions = (self.column - self.starts[:rows]).clamp_(0, self.width - 1)
        return self.trunk(self.tokens[:rows], positions, attend)

    def _mask(self, rows: Tensor) -> None:
        super()._mask(rows)
        self.bias[..., self.end :] = -torch.inf


class TransformersDecoder:
    """Any causal language model, by its own forward pass and transformers' growing cache."""

    joins = False

    def __init__(self, model: PreTrainedModel, pad_id: int) -> None:
        self.model, self.pad_id = model, pad_id
        # Elsewhere transformers makes it: eager attention adds numbers, and a sliding window sees less.
        self.own_mask = sees_before_it(model.base_model) and not has_window(model)
        read = inspect.signature(model.base_model.forward).parameters
        self.cache_name = "cache_params" if "cache_params" in read else "past_key_values"

    def begin(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        tokens, self.mask = (x.to(self.model.device) for x in left_pad(prompts, self.pad_id))
        self.cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        self.positions = position_ids(self.mask)
        return self._forward(tokens)

    def step(self, tokens: Tensor) -> Tensor:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        self.positions = self.positions[:, -1:] + 1
        return self._forward(tokens[:, None])

    def logits(self, hidden: Tensor) -> Tensor:
        return next_token_logits(self.model, hidden)

    def keep(self, rows: Tensor) -> None:
        self.mask, self.positions = self.mask[rows], self.positions[rows]
        self.cache.batch_select_indices(rows)

    def _forward(self, tokens: Tensor) -> Tensor:
        return self.model.base_model(
            input_ids=tokens,
            attention_mask=_step_mask(self.mask, tokens.shape[1]) if self.own_mask else self.mask.long(),
            position_ids=self.positions,
            use_cache=True,
            **{self.cache_name: self.cache},
        ).last_hidden_state[:, -1]


class WholeDecoder:
    """Any causal language model, without a cache: each step reads all of each text."""

    joins = True

    def __init__(self, model: PreTrainedModel, pad_id: int) -> None:
        self.model, self.pad_id = model, pad_id
        self.texts: list[list[int]] = []

    def begin(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        self.texts += map(list, prompts)
        return self._read(self.texts[-len(prompts) :])

    def step(self, tokens: Tensor) -> Tensor:
        self.texts = [[*text, token] for text, token in zip(self.texts, tokens.tolist())]
        return self._read(self.texts)

    def logits(self, hidden: Tensor) -> Tensor:
        return next_token_logits(self.model, hidden)

    def keep(self, rows: Tensor) -> None:
        self.texts = [self.texts[i] for i in rows.tolist()]

    def _read(self, texts: list[list[int]]) -> Tensor:
        packed = pack(texts, self.pad_id).to(self.model.device)
        return packed_hidden(self.model, packed, at=packed.ends)


def goes_on_alike(model: PreTrainedModel, decoder: Decoder) -> tuple[Tensor, Tensor]:
    """Logits at the end of two texts and of what they go on with: by a fresh ``decoder``, and by the model itself."""
    one, other = texts(model).tolist()
    longer, shorter, own = one, other[:SHORTER], read(model)
    own = own[0], own[1, :SHORTER]
    found = [decoder.logits(decoder.begin([longer[:-2], shorter[:-2]]))]
    found.append(decoder.logits(decoder.step(torch.tensor([longer[-2], shorter[-2]], device=model.device))))
    decoder.keep(torch.tensor([1], device=model.device))
    found.append(decoder.logits(decoder.step(torch.tensor(shorter[-1:], device=model.device))))
    expected = [torch.stack([logits[i] for logits in own]) for i in (-3, -2)]
    return torch.cat(found), torch.cat([*expected, own[1][-1:]])


def _step_mask(mask: Tensor, width: int) -> Tensor:
    """Boolean attention mask (B, 1, width, S) for the last ``width`` of S positions: real tokens, none ahead.

    Made here, once a step: transformers builds it in every forward pass from general parts, at more than its cost."""
    size = mask.shape[1]
    columns = torch.arange(size, device=mask.device)
    causal = columns <= columns[size - width :, None]
    allowed = causal & mask[:, None, None, :]
    # A padding position sees itself, so that its softmax is not empty (0 / 0); nobody sees it.
    return allowed | (columns == columns[size - width :, None]) if width > 1 else allowed
