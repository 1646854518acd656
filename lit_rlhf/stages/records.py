"""Records of files, split by prompt: what the data of all stages but pretraining have in common."""

from __future__ import annotations

import re
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from pydantic import Field
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.arguments import check_arguments
from lit_rlhf.errors import UserError
from lit_rlhf.models.policy import context_length
from lit_rlhf.text.records import (
    Messages,
    Moved,
    OnBadRecord,
    Paths,
    Reading,
    Records,
    Seen,
    bad_record,
    entries_of,
    files_of,
    is_whole,
    kinds_of,
    load_records,
    read_note,
    records_key,
    split_by_prompt,
    stored_records,
    write_note,
)
from lit_rlhf.text.rows import Rows, progress, write_rows
from lit_rlhf.text.special_tokens import Names, check, special_names
from lit_rlhf.text.token_file import code_digest, kept, tokenizer_digest
from lit_rlhf.text.tokenizer import TokenizerTrainer
from lit_rlhf.training.batches import mixed, shuffled

AT_ONCE = 500  # records that are encoded at a time

Record = TypeVar("Record")


@dataclass(eq=False, repr=False, kw_only=True)
class FileDataModule(LightningDataModule):
    """Files that users bring, and what a person should know of them; with a ``tokenizer`` from ``setup`` on.

    Args:
        on_bad_record: "fail" names the first bad record, "skip" counts them.
        fields: our name of a field -> its name in the files, ``{"prompt": "question"}``; "a.b" is ``b`` inside ``a``.
    """

    on_bad_record: OnBadRecord = "fail"
    fields: dict[str, str] | None = None

    # Makes of a row of its files what it reads; None: not by rows.
    parse_record: ClassVar[Callable[[dict[str, Any]], Any] | None] = None
    ends: ClassVar[bool] = True  # whether its files are read to their ends
    reads: ClassVar[tuple[str, ...]] = ()  # fields that are read later on than by ``parse_record``

    def __post_init__(self) -> None:
        check_arguments(type(self), vars(self))
        super().__init__()
        self.moved = Moved()  # prompts that are not where their hash puts them; a run hands on its own
        self.skipped: list[str] = []  # a line for each bad record
        self.long = 0  # records that were too long
        self.fills_context = False  # whether max_length is all that a model has room for
        self.notes: list[str] = []  # what a person should know
        self.found: dict[str, None] = {}  # of ``fields``, those that some record has
        self.there: dict[str, None] = {}  # names of fields in the files
        self.tell: Callable[[str], None] = rank_zero_info  # how it is said

    def __str__(self) -> str:
        return repr(self)  # Lightning's takes loaders apart that are none of torch's

    def folder(self, cache: str | Path | None) -> Path:
        """The cache folder: ``cache``, or for None a temporary folder that lasts as long as this object."""
        if cache is not None:
            return Path(cache)
        folder = Path(tempfile.mkdtemp(prefix="lit_rlhf-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return folder

    @property
    def how_long(self) -> str:
        """How long the records are that are too long, and what became of them; "" where none can be."""
        return ""

    def for_module(self) -> dict[str, Any]:
        """Keyword arguments of the stage's module that come from its data."""
        return {"tokenizer": self.tokenizer}

    def note(self, line: str) -> None:
        """Say something once: here, and wherever the notes are shown."""
        if line not in self.notes:
            self.notes.append(line)
            self.tell(line)

    def note_seen(self, file: str, seen: Seen) -> None:
        """Say which fields of a file nobody asked for, which of messages only a template may read, and what was made of
        its records."""
        self.found |= seen.found
        self.there |= seen.there
        if names := ", ".join(name for name in seen.unread if name not in self.reads):
            self.note(f"{file}: {self.unread(names)}")
        if names := ", ".join(seen.passed_on):
            self.note(f"{file}: of its messages, {names} goes to the chat template alone")
        for line, count in seen.remarks.items():
            # A stream is read in part, and again: how many there are is not known.
            counted = f" ({count} record{'s' * (count > 1)})" if self.ends else ""
            self.note(f"{file}: {line}{counted}")

    def check_fields(self) -> None:
        """Raise ``UserError`` where ``fields`` names something that no record has."""
        if missing := [name for name in self.fields or {} if name not in self.found]:
            name, address = missing[0], (self.fields or {})[missing[0]]
            asked = f"no record has the field '{address}' that <stage>.data.fields gives for '{name}'"
            raise UserError(f"{self.source}: {asked}; the first has {', '.join(self.there)}")

    def unread(self, names: str) -> str:
        """The note about fields that nobody asked for."""
        return f"nobody reads the field{'s' if ', ' in names else ''} {names}"


def names_of(paths: Paths) -> str:
    """Names of files, for a message."""
    entries = [paths] if isinstance(paths, str | Path | Mapping) else paths
    return ", ".join(str(entry["path"] if isinstance(entry, Mapping) else entry) for entry in entries)


class FitContext(Callback):
    """Lets the data fit into the context of all models of a module, ``new_tokens`` of a response included.

    Raises ``UserError`` where these leave no room for a prompt."""

    def __init__(self, new_tokens: int = 0) -> None:
        self.new_tokens = new_tokens

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        room = self.room(pl_module)
        if isinstance(trainer.datamodule, RecordDataModule):
            trainer.datamodule.fit_context(room)

    def room(self, module: nn.Module) -> int:
        """Tokens of a prompt, or of a whole sequence where nothing is generated, that fit into the context."""
        context = min(context_length(model) for model in module.modules() if isinstance(model, PreTrainedModel))
        if context <= self.new_tokens:
            raise UserError(
                f"{self.new_tokens} new tokens (sampling.max_new_tokens) leave no room for a prompt in the model's "
                f"context of {context}; allow fewer"
            )
        return context - self.new_tokens


@dataclass(eq=False, repr=False)
class RecordDataModule(FileDataModule):
    """Reads files of records and parts them by prompt; arguments as in :class:`FileDataModule`, and

    Args:
        path: a file, a folder, a pattern (``data/*.jsonl``), a Hub name, or a list of them.
        tokenizer: one that is ready, or a function that trains one on the texts.
        batch_size: records per process and batch.
        held_out: fraction of the prompts kept for validation or evaluation.
        split_seed: which ones; the same in every stage.
        seed: order of the others.
        limit: train on at most so many of them, to try things out; None: all.
        cache: the folder that keeps records and tokens, read where they lie, so that they may be more than memory
            holds; it may be deleted at any time. None: all are in memory.
    """

    path: Paths
    tokenizer: PreTrainedTokenizerBase | TokenizerTrainer
    _: KW_ONLY
    batch_size: Annotated[int, Field(ge=1)] = 16
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    split_seed: int = 0
    seed: int = 0
    limit: Annotated[int, Field(ge=1)] | None = None
    cache: str | Path | None = None

    asked: ClassVar[Callable[[Any], Messages]]  # the prompt of a record, by which it is parted
    fold = 0  # which fraction is held out, for cross-validation
    max_length, on_long = 2**31, "skip"  # tokens, and what happens to records that have more
    left_out = 0  # of them, those of which cutting would leave nothing to learn from
    weights: ClassVar[Sequence[float] | None] = None  # of the path's entries
    about: ClassVar[Callable[[Any], Any] | None] = None  # of a record what is to be known of all together
    example: ClassVar[type | None] = None  # the NamedTuple that :meth:`encoded` makes of records; None: stays in memory
    counts: ClassVar[tuple[str, ...]] = ("skipped", "long", "left_out")  # what :meth:`encoded` counts or lists

    @property
    def source(self) -> str:
        """The files' names, for a message."""
        return names_of(self.path)

    def records(self) -> tuple[Sequence[Any], Sequence[Any]]:
        """(train, held out)."""
        return self.split(self.load(self.path, self.parse_record))

    def known_of(self, *sides: Sequence[Any]) -> list[Any]:
        """Distinct values of :attr:`about` of the records of some sides."""
        found: dict[Any, None] = {}
        for side in sides:
            known = side.note["about"] if isinstance(side, Records) else [[*self.about(record)] for record in side]
            found |= dict.fromkeys(map(tuple, known))
        return list(found)

    def encoded(self, records: Sequence[Any], held_out: bool) -> list[Any]:
        """The examples of some records, without those that are refused or too long."""
        raise NotImplementedError

    def sequences(self, item: Any) -> list[list[int]]:
        """The token sequences of an example."""
        raise NotImplementedError

    def examples_of(self, records: Sequence[Any], held_out: bool) -> Sequence[Any]:
        """What :meth:`encoded` makes of records; of those on disk it is on disk, too, made once."""
        if not isinstance(records, Records) or self.example is None:
            return self.encoded(records, held_out)
        kinds = [k for k in type(self).__mro__ if issubclass(k, RecordDataModule)]
        template = [self.tokenizer.chat_template, self.tokenizer.special_tokens_map, len(self.tokenizer)]
        names = ("max_length", "on_long", "special_tokens", "on_bad_record", "labels")
        key = {
            "records": records.identity, "held_out": held_out, "entries": records.note["entries"],
            "tokenizer": [tokenizer_digest(self.tokenizer), repr(template)], "code": code_digest(*kinds),
            "settings": {name: getattr(self, name, None) for name in names},
        }  # fmt: skip
        cache = records.file.parent.parent
        folder = kept(cache, "examples", key, partial(self._write_examples, records, held_out), is_whole)
        note = read_note(folder)
        for name in self.counts:
            setattr(self, name, getattr(self, name) + note[name])
        for line in note["notes"]:
            self.note(line)
        return Rows(folder / "rows.arrow", self.example, note["parts"])

    def _write_examples(self, records: Records[Any], held_out: bool, folder: Path) -> None:
        before = {name: getattr(self, name) for name in self.counts}
        for name, value in before.items():
            setattr(self, name, type(value)())
        notes, parts = [], []
        self.note = lambda line: (notes.append(line), type(self).note(self, line))  # also what was said before

        def examples() -> Iterator[Any]:
            for entry in records.by_entry():
                parts.append(0)
                for begin in range(0, len(entry), AT_ONCE):
                    made = self.encoded(list(entry[begin : begin + AT_ONCE]), held_out)
                    parts[-1] += len(made)
                    yield from made

        what = "tokenizing what is held out" if held_out else "tokenizing"
        write_rows(
            folder / "rows.arrow", self.example, progress(examples(), what, "examples", len(records)),
            {"size": lambda item: sum(map(len, self.sequences(item))),
             "longest": lambda item: max(map(len, self.sequences(item)))},
        )  # fmt: skip
        write_note(folder, {**{name: getattr(self, name) for name in self.counts}, "notes": notes, "parts": parts})
        del self.note
        for name, value in before.items():
            setattr(self, name, value)

    def lengths(self, items: Sequence[Any]) -> Sequence[int]:
        """Tokens of each of some examples."""
        if isinstance(items, Rows):
            return items.column("size")
        return [sum(map(len, self.sequences(item))) for item in items]

    def longest_of(self, items: Sequence[Any]) -> int:
        """Tokens of the longest sequence of some examples."""
        if isinstance(items, Rows):
            return int(items.column("longest").max(initial=0))
        return max((len(s) for item in items for s in self.sequences(item)), default=0)

    def order(self, examples: Sequence[Any], length: int | None = None) -> Callable[[int], list[int]]:
        """An order of examples for a loader: each epoch shuffled anew, by the weights of their sources."""
        if self.weights is None:
            return shuffled(len(examples), self.seed, length)
        if not isinstance(examples, Rows) or len(self.weights) != len(examples.parts):
            found = len(examples.parts) if isinstance(examples, Rows) else 0
            raise UserError(f"weights (data) has {len(self.weights)} entries for {found} sources in {self.source}")
        if 0 in examples.parts:
            raise UserError(
                f"{self.source}: nothing to train on in source {examples.parts.index(0) + 1} of data.weights"
            )
        return mixed(examples.parts, self.weights, self.seed, length)

    def encode(self) -> None:
        """Make tokens of what was read, none longer than ``max_length``. Raises ``UserError`` where nothing is left."""
        raise NotImplementedError

    def longest(self) -> int:
        """Tokens of the longest of what was encoded."""
        raise NotImplementedError

    def fit_context(self, room: int) -> None:
        """Let nothing be longer than the ``room`` tokens that a model has for it: as if that were ``max_length``."""
        asked = self.max_length
        if room >= asked or room >= self.longest():
            return
        known, long, self.max_length, self.fills_context = list(self.skipped), self.long, room, True
        self.encode()
        self.skipped = known  # the same records are refused once more
        line = f"the model's context has room for {room} tokens, not max_length={asked}"
        longer = f"{self.long} records were longer" if self.long else "longer records count as too long"
        same = self.long and self.long == long  # which were counted already
        self.note(f"{line}: the same records are longer" if same else f"{line}: {longer} ({self._on_long()})")

    @property
    def how_long(self) -> str:
        """How long the records are that are too long, and what became of them."""
        return f"longer than max_length={self.max_length} tokens ({self._on_long()})"

    def _on_long(self) -> str:
        if self.on_long == "skip" or not self.left_out:
            return f"on_long={self.on_long}"
        return f"on_long=cut, which left nothing to learn from in {self.left_out} of them"

    def check_left(self, what: str, train: Sequence[Any] | None, held_out: Sequence[Any]) -> None:
        """Raise ``UserError`` where all of a side was left out for its length; ``train``: None where it is not read."""
        nothing = train is not None and not train
        if nothing or not held_out:
            short = "train on" if nothing else "test on"
            ways = [] if self.fills_context else ["raise it (up to the model's context)"]
            ways += ["set on_long=cut"] if self.on_long == "skip" else ["give shorter ones"]
            raise UserError(
                f"{self.source}: {self.long} {what} are longer than max_length={self.max_length} tokens, and none is "
                f"left to {short}; {', or '.join(ways)}"
            )

    def load(self, path: Paths, parse: Callable[[dict[str, Any]], Record]) -> Sequence[Record]:
        """All records of the files at ``path``; what nobody reads of them is noted, a line for each file."""
        if kinds_of(parse) and (self.cache is not None or self.weights is not None):
            return self._load_to_disk(path, parse)
        records: list[Record] = []
        for file in files_of(path):
            loaded = load_records(file, parse, self.on_bad_record, self.fields)
            records += loaded.records
            self.skipped += loaded.skipped
            self.note_seen(file, loaded.seen)
        return records

    def _load_to_disk(self, path: Paths, parse: Callable[[dict[str, Any]], Record]) -> Records[Record]:
        asked, about = (self.asked, self.about) if parse is self.parse_record else (None, None)
        how = Reading(parse, self.on_bad_record, self.fields, asked, self.split_seed, about)
        entries = entries_of(path)
        key = records_key(entries, how)
        records = stored_records(entries, how, key, self.folder(self.cache if key else None))
        self.skipped += records.note["skipped"]
        for file, seen in records.note["seen"]:
            self.note_seen(file, Seen(**seen))
        return records

    def refuse(self, record: Any, reason: str) -> None:
        """A record that is bad for a reason that shows when it is encoded: an error, or counted."""
        bad_record(record.place or self.source, reason, self.skipped, self.on_bad_record)

    def special_names(self) -> Names | re.Pattern[str]:
        """The names of special tokens that no text may hold where they are refused."""
        return special_names(self.tokenizer)

    def allowed(self, records: Sequence[Record], texts: Callable[[Record], Any]) -> Sequence[Record]:
        """Some records; for ``special_tokens="refuse"``, without those whose texts hold names of such tokens."""
        if getattr(self, "special_tokens", "plain") != "refuse":
            return records
        names, kept = self.special_names(), []
        for record in records:
            try:
                check(names, texts(record))
                kept.append(record)
            except UserError as error:
                self.refuse(record, str(error))
        return kept

    def split(self, records: Sequence[Record]) -> tuple[Sequence[Record], Sequence[Record]]:
        """(train, held out), the same in every stage; the prompts that change sides are noted."""
        self.check_fields()
        before = self.moved.held_out | self.moved.train
        try:
            if isinstance(records, Records):
                sides = records.split(self.held_out, self.fold, self.moved, from_each=self.weights is not None)
            else:
                sides = split_by_prompt(records, self.asked, self.held_out, self.split_seed, self.fold, self.moved)
        except UserError as error:
            raise UserError(f"{self.source}: {error}") from None
        if new := (self.moved.held_out | self.moved.train) - before:
            side = "held out" if self.moved.held_out & new else "trained on"
            whose = "its" if self.weights is None else "one source's"
            self.note(
                f"{self.source}: none of {whose} prompts would be {side} by split_seed={self.split_seed}; {len(new)} "
                "of them changed sides, for all stages to come"
            )
        if self.moved.kept:
            self.note(
                f"{self.source}: held_out={self.held_out:g} would hold out {self.moved.kept} more records, but earlier "
                "stages trained on their prompts: they are trained on here, too"
            )
        return sides
