"""Decoders: read prompts and continue them token by token. The fast ones are in ``models/kernels``."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from lit_rlhf.functional import position_ids
from lit_rlhf.models.logits import next_token_logits
from lit_rlhf.models.policy import packed_hidden
from lit_rlhf.models.self_check import SHORTER, read, texts
from lit_rlhf.text.packing import left_pad, pack


class Decoder(Protocol):
    """A batch of texts that are being written, one per row."""

    joins: bool  # whether texts can begin while others are being written

    def begin(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Add a row for each of n prompts behind those there are; their last hidden states (n, E)."""
        ...

    def step(self, tokens: Tensor) -> Tensor:
        """The next token (A,) of each row; the hidden states (A, E) that it leads to."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (A, V) of the next token, from hidden states (A, E)."""
        ...

    def keep(self, rows: Tensor) -> None:
        """Keep only these ``rows`` (int64) of the batch, in this order."""
        ...


class TransformersDecoder:
    """Decoder of any causal language model: its own forward pass, with the key-value cache of transformers."""

    joins = False

    def __init__(self, model: PreTrainedModel, pad_id: int) -> None:
        self.model, self.pad_id = model, pad_id
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
        output = self.model.base_model(
            input_ids=tokens,
            attention_mask=self.mask.long(),
            position_ids=self.positions,
            use_cache=True,
            **{self.cache_name: self.cache},
        )
        hidden: Tensor = output.last_hidden_state[:, -1]
        return hidden


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


def same_continuation(model: PreTrainedModel, decoder: Decoder) -> tuple[Tensor, Tensor]:
    """Logits at the end of two texts and of what they go on with: by a fresh ``decoder``, and by the model itself."""
    one, other = texts(model).tolist()
    longer, shorter, whole = one, other[:SHORTER], read(model)
    own = whole[0], whole[1, :SHORTER]
    found = [decoder.logits(decoder.begin([longer[:-2], shorter[:-2]]))]
    found.append(decoder.logits(decoder.step(torch.tensor([longer[-2], shorter[-2]], device=model.device))))
    decoder.keep(torch.tensor([1], device=model.device))
    found.append(decoder.logits(decoder.step(torch.tensor(shorter[-1:], device=model.device))))
    expected = [torch.stack([logits[i] for logits in own]) for i in (-3, -2)]
    return torch.cat(found), torch.cat([*expected, own[1][-1:]])
