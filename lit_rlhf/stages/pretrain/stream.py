"""Text from a stream, which need not end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import islice
from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_rlhf.errors import UserError
from lit_rlhf.stages.pretrain.data import PretrainDataModule
from lit_rlhf.stages.records import names_of
from lit_rlhf.text.chat import behind_start
from lit_rlhf.text.records.stream import SHIFT, Windows
from lit_rlhf.text.special_tokens import encode_texts, text_start
from lit_rlhf.text.token_file import Span, Tokens
from lit_rlhf.training.batches import seeded


class WindowTokens(Windows[str, int]):
    """The tokens of a stream's documents, window by window."""

    def rows(self, starts: Sequence[int], length: int) -> Tensor:
        """(B, length) int64: the tokens that follow each of B places."""
        places = [(int(start) >> SHIFT, int(start) & (2**SHIFT - 1)) for start in starts]
        return torch.from_numpy(np.stack([self.window(n)[i : i + length] for n, i in places]).astype(np.int64))


@dataclass(eq=False, repr=False)
class StreamPretrainDataModule(PretrainDataModule):
    """Text that is read and tokenized as it is trained on: ``trainer.max_steps`` says how long.

    A window of documents is read, cut into rows, shuffled and trained on, then the next; a source that ends begins
    anew. A run that goes on reads up to its window again, without tokenizing it. Arguments as in
    :class:`PretrainDataModule`, and

    Args:
        window: documents that are read at a time; their tokens are in memory, in each process.
        validation: documents that are held out: the first ones.
    """

    _: KW_ONLY
    window: Annotated[int, Field(ge=1)] = 10_000
    validation: Annotated[int, Field(ge=1)] = 256

    ends = False
    weights: ClassVar[None] = None
    old_path: ClassVar[None] = None
    held_out: ClassVar[float] = 0.0
    limit: ClassVar[None] = None
    cache: ClassVar[None] = None

    def setup(self, stage: str | None = None) -> None:
        if self.train_streams:
            return
        if not isinstance(self.tokenizer, PreTrainedTokenizerBase):
            self.tokenizer = self.tokenizer(list(islice(self._texts(), self.validation + self.window)))
        self.tokenizer.chat_template = self.tokenizer.chat_template or behind_start(self.tokenizer, self.base_template)
        held_out = self._tokens(list(islice(self._texts(), self.validation)))
        file = self.folder(None) / "held_out.bin"
        held_out.tofile(file)
        self.val_stream, self.old_stream = Tokens([Span(file, held_out.dtype.str, 0, 0, len(held_out))]), None
        self._tokens_of_all = WindowTokens(self._train_texts, self.window, self._tokens, names_of(self.path))
        self.train_streams = [self._tokens_of_all]
        self._check_length(f"the first {self.validation} documents, which are held out", self.val_stream)
        self._check_length(f"the first {self.window} documents", self._tokens_of_all)

    def _order(self, epoch: int) -> np.ndarray:
        generator, count = seeded(self.seed, epoch), len(self._tokens_of_all.window(epoch))
        if (rows := (count - 1) // self.block_size) < 1:
            raise UserError(f"{self.window} documents (pretrain.data.window) have {count} tokens, less than one row")
        offset = torch.randint(count - rows * self.block_size, (1,), generator=generator)
        starts = offset + torch.randperm(rows, generator=generator) * self.block_size
        return ((epoch << SHIFT) + starts).numpy()

    def _texts(self) -> Iterator[str]:
        for files in self.entries:
            for file in files:
                yield from ("".join(document) for document in self._documents(file, self.skipped))

    def _train_texts(self) -> Iterator[str]:
        return islice(self._texts(), self.validation, None)

    def _tokens(self, texts: list[str]) -> np.ndarray:
        start, end = text_start(self.tokenizer), self.tokenizer.eos_token_id
        found = encode_texts(self.tokenizer, texts, self.special_tokens)
        return np.array([token for ids in found for token in (*start, *ids, end)], np.int32)
