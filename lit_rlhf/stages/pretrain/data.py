"""Unlabelled text as full rows of tokens, from one source or a weighted mixture."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cache, cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Generator
from transformers import PreTrainedTokenizerBase

from lit_rlhf import __version__ as version
from lit_rlhf.errors import UserError
from lit_rlhf.models.text_rows import TextRows
from lit_rlhf.stages.records import FileDataModule
from lit_rlhf.text.chat import BASE_TEMPLATE, WORLD_MARK, behind_start
from lit_rlhf.text.packing import runs
from lit_rlhf.text.records import (
    Paths,
    Seen,
    entries_of,
    files_of,
    format_of,
    identity_of,
    parse_text,
    read_pieces,
    read_records,
)
from lit_rlhf.text.special_tokens import Names, SpecialTokens, check, special_names, text_start
from lit_rlhf.text.token_file import GIVEN, Document, Stored, Tokens, given_tokens, kept, stored
from lit_rlhf.text.tokenizer import TokenizerTrainer, load_tokenizer, train_bpe, train_characters
from lit_rlhf.text.world import World, world_fingerprint
from lit_rlhf.training.batches import BatchLoader, dealing, in_order, seeded, sharding
from lit_rlhf.training.parts import DataInParts


class Source(NamedTuple):
    """Where documents come from."""

    name: str
    documents: Callable[[list[str]], Iterator[Document]]  # anew each time; notes down a line for each that is skipped
    identity: Any = None  # plain values that change when the documents do; None: nobody can tell


@dataclass(eq=False, repr=False)
class PretrainDataModule(FileDataModule, DataInParts):
    """Text from files: .txt (one document), or records with a field ``text``; or tokens that the user has made.

    Text is tokenized once and read where it lies on disk: it may be larger than memory.

    Args:
        path: a file, a folder, a pattern (``data/*.jsonl``), a Hub name, or a list of them; None: there is no text. A
            .npy or .bin file holds tokens.
        tokenizer: one that is ready, or a function that trains one on the texts.
        weights: share of each entry of ``path`` in what is read, of any sum, its files in proportion to their sizes;
            where ``path`` is no list, of each of its files. None reads all in proportion to their sizes.
        old_path: one or several files of the kind of text that a checkpoint was trained on. Nothing is learned from
            them: validation computes their loss too, which shows what is forgotten. None: there are none.
        block_size: tokens per row (T); documents follow each other with end-of-text between them.
        batch_size: rows per process and step (B).
        held_out: fraction of each source's end that is kept for validation (documents; of a single one, text).
        seed: order and offsets of the rows.
        limit: at most so many documents of each source, to try things out; None: all.
        on_bad_record: "fail" names the first bad record, "skip" counts them.
        fields: our name of a field -> its name in the file ("a.b": ``b`` inside ``a``), where it has others.
        cache: the folder that keeps the tokens, which may be deleted at any time; None: they last as long as this.
    """

    path: Paths | None
    tokenizer: PreTrainedTokenizerBase | TokenizerTrainer
    _: KW_ONLY
    weights: list[Annotated[float, Field(gt=0)]] | None = None
    old_path: Paths | None = None
    block_size: Annotated[int, Field(ge=2)] = 512
    batch_size: Annotated[int, Field(ge=1)] = 16
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    seed: int = 0
    limit: Annotated[int, Field(ge=1)] | None = None
    special_tokens: SpecialTokens = "plain"
    cache: str | Path | None = None

    parse_record = staticmethod(parse_text)
    base_template = BASE_TEMPLATE

    def __post_init__(self) -> None:
        super().__post_init__()
        self.entries, self.old_paths = entries_of(self.path or []), files_of(self.old_path or [])
        self.train_streams: list[Tokens] = []  # a source each
        if self.weights is not None and len(self.weights) != len(self.entries):
            raise UserError(f"weights (pretrain.data) has {len(self.weights)} entries for {len(self.entries)} sources")

    def sizes(self) -> dict[str, int]:
        return {}

    def for_module(self) -> dict[str, Any]:
        return {**super().for_module(), "note": self.note}

    def sources(self) -> list[Source]:
        """Where the documents come from."""
        return self._files([file for files in self.entries for file in files])

    def _files(self, paths: list[str]) -> list[Source]:
        return [Source(path, partial(self._documents, path), self._identity(path)) for path in paths]

    def _documents(self, path: str, skipped: list[str]) -> Iterator[Document]:
        if format_of(path) == ".txt":
            yield read_pieces(path) if self._refused is None else _checked(path, self._refused)
        else:
            seen = Seen(skipped)
            try:
                texts = read_records(path, self._parsed, seen, self.on_bad_record, self.fields)
                yield from ((text,) for text in texts)
            finally:  # those who read may stop before the end
                self.note_seen(path, seen)
                if seen.there and len(seen.found) < len(self.fields or {}):
                    asked = ", ".join((self.fields or {}).values())
                    self.note(f"{path}: no record has the field {asked} of data.fields; its own 'text' is read")

    def _parsed(self, row: dict[str, Any]) -> str:
        text = parse_text(row)
        if self._refused is not None:
            check(self._refused, text)
        return text

    @property
    def _refused(self) -> Names | None:
        """Names of special tokens that no text may hold; None: all may, or the tokenizer is not known yet."""
        known = isinstance(self.tokenizer, PreTrainedTokenizerBase)
        return self._names if known and self.special_tokens == "refuse" else None

    @cached_property
    def _names(self) -> Names:
        return special_names(self.tokenizer)

    def _identity(self, path: str) -> Any:
        known = None if path.endswith(GIVEN) else identity_of(path)
        return known and [*known, self.on_bad_record, self.fields, version]

    def setup(self, stage: str | None = None) -> None:
        if self.train_streams:
            return
        sources = self.sources()
        # The tokenizer sees all text, so that every character of the validation text can be written with it.
        if not isinstance(self.tokenizer, PreTrainedTokenizerBase):
            self.tokenizer = self._trained(sources)
        self.tokenizer.chat_template = self.tokenizer.chat_template or behind_start(self.tokenizer, self.base_template)
        parts = [self._stored(source) for source in sources]
        old = [self._stored(source) for source in self._files(self.old_paths)]
        self.skipped = [line for part in [*parts, *old] for line in part.skipped]
        self.old_stream = Tokens([tokens for part in old for tokens in (part.train, part.held_out)]) if old else None
        self.train_streams = [Tokens([part.train]) for part in parts]
        self.val_stream = Tokens([part.held_out for part in parts])
        for source, tokens in zip(sources, self.train_streams):
            self._check_length(source.name, tokens)
        if unknown := sum(part.unknown for part in [*parts, *old]):
            made = f"{self.tokenizer.unk_token!r} stands for each"
            self.note(f"the tokenizer cannot write {unknown} characters of the text or runs of them: {made}")
        self._check_length("the validation text", self.val_stream)
        if self.old_stream is not None:
            self._check_length(", ".join(self.old_paths), self.old_stream)
        self._starts = torch.tensor([0, *map(len, self.train_streams)]).cumsum(0)
        self._tokens_of_all = Tokens([part.train for part in parts])

    def _limited(self, source: Source, skipped: list[str]) -> Iterator[Document]:
        return islice(source.documents(skipped), self.limit)

    def _stored(self, source: Source) -> Stored:
        path = Path(source.name)
        if path.suffix in GIVEN:
            return given_tokens(path.expanduser(), self.held_out, len(self.tokenizer))
        identity = [source.identity, self.limit]
        folder = self.folder(self.cache if source.identity is not None else None)
        return stored(
            partial(self._limited, source), identity, self.tokenizer, self.held_out, folder, self.special_tokens
        )

    def _trained(self, sources: list[Source]) -> PreTrainedTokenizerBase:
        """The tokenizer that is trained on the documents, kept where it is known what it is made from."""
        if given := [source.name for source in sources if Path(source.name).suffix in GIVEN]:
            raise UserError(
                f"{given[0]}: tokens need the tokenizer that made them, and this one would be trained on text; give it "
                "as tokenizer=hf tokenizer.path=FOLDER"
            )

        def train() -> PreTrainedTokenizerBase:
            return self.tokenizer(
                piece for source in sources for document in self._limited(source, []) for piece in document
            )

        how = self.tokenizer
        how = how if isinstance(how, partial) else partial(how)
        known = how.func in (train_bpe, train_characters) and None not in [source.identity for source in sources]
        if not known or self.cache is None:
            return train()
        code = hashlib.sha256(inspect.getsource(inspect.getmodule(how.func)).encode()).hexdigest()
        key = {
            "sources": [source.identity for source in sources], "limit": self.limit,
            "trainer": [how.func.__name__, how.args, how.keywords, code],
        }  # fmt: skip
        return load_tokenizer(
            kept(
                Path(self.cache), "tokenizer", key,
                lambda folder: train().save_pretrained(folder), lambda folder: (folder / "tokenizer.json").is_file(),
            )
        )  # fmt: skip

    def _check_length(self, what: str, tokens: Tokens) -> None:
        if len(tokens) <= self.block_size + 1:
            raise UserError(
                f"{what}: {len(tokens)} tokens, less than one row of {self.block_size} (pretrain.data.block_size); "
                "give more text or a smaller block_size"
            )

    def _order(self, epoch: int) -> np.ndarray:
        """Where each row of an epoch starts. Each epoch cuts the streams at another offset and shuffles the rows."""
        generator = seeded(self.seed, epoch)
        rows = [(len(s) - 1) // self.block_size - 1 for s in self.train_streams]
        rows = [max(1, r) for r in rows]
        weights = list(map(float, rows))
        if self.weights:
            files = iter(weights)
            entries = [list(islice(files, len(entry))) for entry in self.entries]
            weights = [w * (r / sum(entry)) for w, entry in zip(self.weights, entries) for r in entry]
        counts = [max(1, round(sum(rows) * w / sum(weights))) for w in weights]
        starts = []
        for source, count in enumerate(counts):
            passes = -(-count // rows[source])
            order = torch.cat([torch.randperm(rows[source], generator=generator) for _ in range(passes)])[:count]
            spare = len(self.train_streams[source]) - 1 - rows[source] * self.block_size
            offset = torch.randint(min(spare, self.block_size - 1) + 1, (1,), generator=generator)
            starts.append(self._starts[source] + offset + order * self.block_size)
        return torch.cat(starts)[torch.randperm(sum(counts), generator=generator)].numpy()

    def _collate(self, tokens: Tokens, mine: Sequence[int]) -> TextRows:
        rows = tokens.rows(mine, self.block_size + 1)
        if start := text_start(self.tokenizer):  # in place of the first token, which nothing predicts
            rows = torch.cat([torch.tensor(start).expand(len(rows), -1), rows[:, 1:]], dim=1)
        return TextRows(rows)

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
            cut=lambda mine: [mine[run] for run in runs([self.block_size] * len(mine), self.learned_at_once)],
            **sharding(self.trainer),
        )

    def val_dataloader(self) -> BatchLoader[TextRows] | list[BatchLoader[TextRows]]:
        """The held-out text; behind it, where there is any, that of ``old_path``."""
        held_out = self._in_order(self.val_stream)
        return held_out if self.old_stream is None else [held_out, self._in_order(self.old_stream)]

    def _in_order(self, tokens: Tokens) -> BatchLoader[TextRows]:
        rows = (len(tokens) - 1) // self.block_size
        return BatchLoader(
            in_order(rows),
            max(1, min(4 * self.batch_size, rows, self.read_at_once // self.block_size)),
            lambda mine, _: self._collate(tokens, [i * self.block_size for i in mine]),
            keep_rest=True,
            **dealing(self.trainer),
        )


def _checked(path: str, names: Names) -> Iterator[str]:
    """The pieces of a .txt file. Raises ``UserError`` with the line of the first of some names."""
    first = 1
    for piece in read_pieces(path):
        for number, line in enumerate(piece.split("\n"), first):
            try:
                check(names, line)
            except UserError as error:
                raise UserError(f"{path}:{number}: {error}") from None
        first += piece.count("\n")
        yield piece


class WorldPretrainDataModule(PretrainDataModule):
    """The corpus of the built-in world; arguments as in :class:`PretrainDataModule`."""

    base_template = WORLD_MARK + BASE_TEMPLATE

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
        cache: str | Path | None = None,
    ) -> None:
        super().__init__(
            "world", tokenizer, block_size=block_size, batch_size=batch_size, held_out=held_out, seed=seed, limit=limit,
            cache=cache,
        )  # fmt: skip
        self.world, self.documents, self.split_seed = world, documents, split_seed

    def sources(self) -> list[Source]:
        count = min(self.documents, self.limit or self.documents)  # what the limit would cut off is not written

        @cache  # the tokenizer is trained on them, too
        def texts() -> list[str]:
            return self.world.corpus(count, self.split_seed, split_seed=self.split_seed)

        def documents(skipped: list[str]) -> Iterator[Document]:
            return ((text,) for text in texts())

        identity = ["world", world_fingerprint(), self.world.seed, count, self.split_seed]
        return [Source("the built-in world", documents, identity)]
