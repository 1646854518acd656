"""Records of files, split by prompt: what the data of all stages but pretraining have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info

from lit_rlhf.errors import UserError
from lit_rlhf.text.records import Messages, Moved, OnBadRecord, bad_record, files_of, load_records, split_by_prompt

Record = TypeVar("Record")
Paths = str | Path | Sequence[str | Path]


class FileDataModule(LightningDataModule):
    """Files that users bring, and what a person should know of them.

    Args:
        fields: our name of a field -> its name in the files, ``{"prompt": "question"}``; "a.b" is ``b`` inside ``a``.
        on_bad_record: "fail" names the first bad record, "skip" counts them.
    """

    reads: tuple[str, ...] = ()  # fields that are read later on than by ``parse_record``

    def __init__(self, *, fields: Mapping[str, str] | None = None, on_bad_record: OnBadRecord = "fail") -> None:
        super().__init__()
        self.fields = fields
        self.on_bad_record: OnBadRecord = on_bad_record
        self.skipped: list[str] = []  # a line for each bad record
        self.notes: list[str] = []  # what a person should know
        self.tell: Callable[[str], None] = rank_zero_info  # how it is said

    def note(self, line: str) -> None:
        """Say something once: here, and wherever the notes are shown."""
        if line not in self.notes:
            self.notes.append(line)
            self.tell(line)

    def note_fields(self, file: str, unread: Iterable[str], passed_on: Iterable[str] = ()) -> None:
        """Name the fields of a file that nobody asked for, and those of messages that only a template may read."""
        if names := ", ".join(name for name in unread if name not in self.reads):
            self.note(f"{file}: {self.unread(names)}")
        if names := ", ".join(passed_on):
            self.note(f"{file}: of its messages, {names} goes to the chat template alone")

    def unread(self, names: str) -> str:
        """What is said of fields that nobody asked for."""
        return f"nobody reads the field{'s' if ', ' in names else ''} {names}"


class RecordDataModule(FileDataModule):
    """Reads files of records and parts them by prompt; arguments as in :class:`FileDataModule`, and

    Args:
        path: a file, a pattern (``data/*.jsonl``), a Hub name, or a list of them.
        held_out: fraction of the prompts kept for validation or evaluation.
        split_seed: which ones; the same in every stage.
        fold: which fraction of them, for cross-validation.
    """

    def __init__(
        self, path: Paths, *, held_out: float = 0.1, split_seed: int = 0, fold: int = 0, **reading: Any
    ) -> None:
        super().__init__(**reading)
        self.path = path
        self.held_out, self.split_seed, self.fold = held_out, split_seed, fold
        self.moved = Moved()  # prompts that are not where their hash puts them; a run hands on its own
        self.long = 0  # records that were too long

    @property
    def source(self) -> str:
        """The files' names, for a message."""
        return str(self.path) if isinstance(self.path, str | Path) else ", ".join(map(str, self.path))

    def load(self, path: Paths, parse: Callable[[dict[str, Any]], Record]) -> list[Record]:
        """All records of the files at ``path``; what nobody reads of them is noted, a line for each file."""
        records: list[Record] = []
        for file in files_of(path):
            loaded = load_records(file, parse, self.on_bad_record, self.fields)
            records += loaded.records
            self.skipped += loaded.skipped
            self.note_fields(file, loaded.unread, loaded.passed_on)
        return records

    def refuse(self, record: Any, reason: str) -> None:
        """A record that is bad for a reason that shows when it is encoded: an error, or counted."""
        bad_record(record.place or self.source, reason, self.skipped, self.on_bad_record)

    def split(
        self, records: list[Record], prompt: Callable[[Record], Messages]
    ) -> tuple[list[Record], list[Record]]:
        """(train, held out), the same in every stage; the prompts that change sides are noted."""
        before = self.moved.held_out | self.moved.train
        try:
            sides = split_by_prompt(records, prompt, self.held_out, self.split_seed, self.fold, self.moved)
        except UserError as error:
            raise UserError(f"{self.source}: {error}") from None
        if new := (self.moved.held_out | self.moved.train) - before:
            side = "held out" if self.moved.held_out & new else "trained on"
            self.note(
                f"{self.source}: none of its prompts would be {side} by split_seed={self.split_seed}; {len(new)} of "
                "them changed sides, for all stages to come"
            )
        return sides
