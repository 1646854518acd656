"""Unlabelled text as packed rows of tokens, from one source or a weighted mixture."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, NamedTuple

import torch
from lightning import LightningDataModule
from pydantic import Field
from torch import Generator, Tensor
from transformers import PreTrainedTokenizerBase

from lit_rlhf.errors import UserError
from lit_rlhf.text.chat import BASE_TEMPLATE
from lit_rlhf.text.packing import stream
from lit_rlhf.text.records import OnBadRecord, load_records, parse_text
from lit_rlhf.text.world import World
from lit_rlhf.training import BatchLoader, in_order, seeded, sharding

TokenizerTrainer = Callable[[Iterable[str]], PreTrainedTokenizerBase]


class TextRows(NamedTuple):
    """B windows of T + 1 tokens: each token predicts the next."""

    tokens: Tensor  # (B, T + 1) int64

    def to(self, device: torch.device) -> TextRows:
        """The rows on ``device``."""
        return TextRows(self.tokens.to(device))

    @property
    def inputs(self) -> Tensor:
        """(B, T)"""
        return self.tokens[:, :-1]

    @property
    def labels(self) -> Tensor:
        """(B, T)"""
        return self.tokens[:, 1:]


class PretrainDataModule(LightningDataModule):
    """Text from files: .txt (one document), or records with a field ``text``.

    Args:
        path: a file, a Hub name, or a list of them; None: there is no text.
        tokenizer: one that is ready, or a function that trains one on the texts.
        weights: share of each source in what is read, of any sum; None reads each in proportion to its size.
        block_size: tokens a row (T); documents follow each other with end-of-text between them.
        batch_size: rows a process and step (B).
        held_out: fraction of each source's end that is kept for validation (documents; of a single one, text).
        seed: order and offsets of the rows.
        limit: at most so many documents of each source, to try things out; None: all.
        on_bad_record: "fail" names the first bad record, "skip" counts them.
    """

    parse_record = staticmethod(parse_text)

    def __init__(
        self,
        path: str | list[str] | None,
        tokenizer: PreTrainedTokenizerBase | TokenizerTrainer,
        *,
        weights: list[Annotated[float, Field(gt=0)]] | None = None,
        block_size: Annotated[int, Field(ge=2)] = 128,
        batch_size: Annotated[int, Field(ge=1)] = 16,
        held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1,
        seed: int = 0,
        limit: Annotated[int, Field(ge=1)] | None = None,
        on_bad_record: OnBadRecord = "fail",
    ) -> None:
        super().__init__()
        self.limit = limit
        self.paths = [path] if isinstance(path, str) else list(path or [])
        self._tokenizer = tokenizer
        self.weights = weights
        self.block_size, self.batch_size, self.held_out, self.seed = block_size, batch_size, held_out, seed
        self.on_bad_record = on_bad_record
        self.skipped: list[str] = []
        self.train_streams: list[Tensor] = []  # a source each, (tokens,) int32
        if weights is not None and len(weights) != len(self.paths):
            raise UserError(f"pretrain.data.weights has {len(weights)} entries for {len(self.paths)} sources")

    def sources(self) -> list[list[str]]:
        """The documents of each source."""
        loaded = [load_records(path, self.parse_record, self.on_bad_record) for path in self.paths]
        self.skipped = [line for source in loaded for line in source.skipped]
        return [source.records for source in loaded]

    def setup(self, stage: str | None = None) -> None:
        if self.train_streams:
            return
        sources = [documents[: self.limit] for documents in self.sources()]
        # The tokenizer sees all text, so that every character of the validation text can be written with it.
        self.tokenizer = (
            self._tokenizer
            if isinstance(self._tokenizer, PreTrainedTokenizerBase)
            else self._tokenizer(text for documents in sources for text in documents)
        )
        self.tokenizer.chat_template = self.tokenizer.chat_template or BASE_TEMPLATE
        parts = [self._split(documents) for documents in sources]
        self.train_streams = [self._tokens(train) for train, _ in parts]
        self.val_stream = torch.cat([self._tokens(held_out) for _, held_out in parts])
        for documents, tokens in zip(self.paths, self.train_streams):
            self._check_length(documents, tokens)
        self._check_length("the validation text", self.val_stream)
        self._starts = torch.tensor([0, *map(len, self.train_streams)]).cumsum(0)
        self._tokens_of_all = torch.cat(self.train_streams)

    def _split(self, documents: list[str]) -> tuple[list[str], list[str]]:
        if len(documents) == 1:
            cut = int(len(documents[0]) * (1 - self.held_out))
            return [documents[0][:cut]], [documents[0][cut:]]
        cut = min(len(documents) - 1, int(len(documents) * (1 - self.held_out)))
        return documents[:cut], documents[cut:]

    def _tokens(self, documents: Sequence[str]) -> Tensor:
        ids = self.tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]
        return stream(ids, self.tokenizer.eos_token_id)

    def _check_length(self, what: str, tokens: Tensor) -> None:
        if len(tokens) <= self.block_size + 1:
            raise UserError(
                f"{what}: {len(tokens)} tokens, less than one row of {self.block_size} (pretrain.data.block_size); "
                "give more text or a smaller block_size"
            )

    def _order(self, epoch: int) -> list[int]:
        """Where each row of an epoch starts. Each epoch cuts the streams at another offset and shuffles the rows."""
        generator = seeded(self.seed, epoch)
        rows = [(len(s) - 1) // self.block_size - 1 for s in self.train_streams]
        rows = [max(1, r) for r in rows]
        weights = self.weights or [float(r) for r in rows]
        counts = [max(1, round(sum(rows) * w / sum(weights))) for w in weights]
        starts = []
        for source, count in enumerate(counts):
            passes = -(-count // rows[source])
            order = torch.cat([torch.randperm(rows[source], generator=generator) for _ in range(passes)])[:count]
            spare = len(self.train_streams[source]) - 1 - rows[source] * self.block_size
            offset = torch.randint(min(spare, self.block_size - 1) + 1, (1,), generator=generator)
            starts.append(self._starts[source] + offset + order * self.block_size)
        return torch.cat(starts)[torch.randperm(sum(counts), generator=generator)].tolist()

    def _collate(self, tokens: Tensor, mine: list[int]) -> TextRows:
        return TextRows(torch.stack([tokens[i : i + self.block_size + 1] for i in mine]).long())

    def rows(self, count: int, generator: Generator) -> TextRows:
        """``count`` training rows drawn from ``generator``, with the sources' weights."""
        order = self._order(0)
        drawn = torch.randint(len(order), (count,), generator=generator)
        return self._collate(self._tokens_of_all, [order[i] for i in drawn.tolist()])

    def train_dataloader(self) -> BatchLoader[TextRows]:
        return BatchLoader(
            self._order,
            self.batch_size,
            lambda mine, _: self._collate(self._tokens_of_all, mine),
            **sharding(self.trainer),
        )

    def val_dataloader(self) -> BatchLoader[TextRows]:
        rows = (len(self.val_stream) - 1) // self.block_size
        return BatchLoader(
            in_order(rows),
            max(1, min(4 * self.batch_size, rows)),
            lambda mine, _: self._collate(self.val_stream, [i * self.block_size for i in mine]),
            keep_rest=True,
        )


class WorldPretrainDataModule(PretrainDataModule):
    """The corpus of the built-in world; arguments as in :class:`PretrainDataModule`."""

    def __init__(
        self,
        world: World,
        tokenizer: PreTrainedTokenizerBase | TokenizerTrainer,
        *,
        documents: Annotated[int, Field(ge=100)] = 24000,
        split_seed: int = 0,
        block_size: Annotated[int, Field(ge=2)] = 96,
        batch_size: Annotated[int, Field(ge=1)] = 16,
        held_out: Annotated[float, Field(gt=0, lt=1)] = 0.02,
        seed: int = 0,
        limit: Annotated[int, Field(ge=1)] | None = None,
    ) -> None:
        super().__init__(
            "world", tokenizer, block_size=block_size, batch_size=batch_size, held_out=held_out, seed=seed, limit=limit
        )
        self.world, self.documents, self.split_seed = world, documents, split_seed

    def sources(self) -> list[list[str]]:
        count = min(self.documents, self.limit or self.documents)  # what the limit would cut off is not written
        return [self.world.corpus(count, self.split_seed, split_seed=self.split_seed)]
