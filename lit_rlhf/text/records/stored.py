"""Records on disk: read once, and found there by fingerprint the next time; neither needs memory for the whole."""

from __future__ import annotations

import hashlib
import inspect
import json
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, TypeVar

import numpy as np

from lit_rlhf.errors import UserError
from lit_rlhf.text.records.files import OnBadRecord, Seen, read_records
from lit_rlhf.text.records.messages import Messages
from lit_rlhf.text.records.sources import identity_of
from lit_rlhf.text.records.split import Moved, by_fingerprint, held_out_mask, split_marks
from lit_rlhf.text.rows import NotPlain, Rows, field_names, progress, write_rows
from lit_rlhf.text.token_file import code_digest, kept

Record = TypeVar("Record")


class _Line(NamedTuple):
    """A record as it is written."""

    kind: int  # which of the kinds that the parser gives
    values: tuple[Any, ...]  # of its fields
    fingerprint: int  # of its prompt, signed; 0 where nobody asks
    place: float  # of its prompt in the split


class Records(Rows[Record]):
    """Records of files, in their order; ``parts``: how many each entry of the path has."""

    def __init__(self, folder: Path, kinds: Sequence[Callable[..., Record]]) -> None:
        super().__init__(folder / "rows.arrow", _Line, ())  # type: ignore[arg-type]
        self.kinds = [(kind, _tuples(kind)) for kind in kinds]
        self.note = read_note(folder)
        self.ends = np.array([*accumulate(self.note["entries"])])  # where each entry ends, in records

    def _item(self, row: dict[str, Any]) -> Record:
        line: Any = super()._item(row)
        kind, tuples = self.kinds[line.kind]
        record: Record = kind(*(tuple(v) if is_tuple else v for v, is_tuple in zip(line.values, tuples)))
        return record

    @property
    def identity(self) -> list[Any]:
        """Plain values that tell these records from others."""
        chosen = b"" if self.places is None else self.places.tobytes()
        return [self.file.parent.name, hashlib.sha256(chosen).hexdigest()]

    def by_entry(self) -> list[Records[Record]]:
        """The records of each entry of the path."""
        return [self[entry] for entry in self._entries()]

    def _entries(self) -> list[slice]:
        places = np.arange(len(self)) if self.places is None else self.places
        return [slice(*cuts) for cuts in pairwise([0, *np.searchsorted(places, self.ends).tolist()])]

    def split(
        self, fraction: float, fold: int, moved: Moved, from_each: bool = False
    ) -> tuple[Records[Record], Records[Record]]:
        """(train, held out) as :func:`lit_rlhf.text.records.split_by_prompt` parts them; with ``from_each`` some
        of each entry are to train on."""
        prints, places = self.column("fingerprint").view(np.uint64), self.column("place")
        held = held_out_mask(prints, places, fraction, fold, moved)
        whole = [entry for entry in self._entries() if held[entry].any() and held[entry].all()] if from_each else []
        for entry in whole:
            moved.train_on_some(by_fingerprint(prints[entry], places[entry]), fraction, fold)
        if whole:
            held = held_out_mask(prints, places, fraction, fold, moved)
        return self.at(~held), self.at(held)


class Reading(NamedTuple):
    """Settings for reading records; plain values and functions that are known by name."""

    parse: Callable[[dict[str, Any]], Any]
    on_bad_record: OnBadRecord = "fail"
    fields: Mapping[str, str] | None = None
    asked: Callable[[Any], Messages] | None = None  # the prompt by which records are parted; None: they are not
    split_seed: int = 0
    about: Callable[[Any], Any] | None = None  # what is to be known of all records: the set of it is kept


def kinds_of(parse: Callable[[dict[str, Any]], Any] | None) -> tuple[Any, ...]:
    """The NamedTuples or dataclasses that a parser says it returns; () where it does not say, or others."""
    said = typing.get_type_hints(getattr(parse, "func", parse)).get("return") if parse is not None else None
    kinds = typing.get_args(said) if typing.get_origin(said) in (typing.Union, UnionType) else (said,)
    return kinds if all(hasattr(k, "_fields") or hasattr(k, "__dataclass_fields__") for k in kinds) else ()


def records_key(entries: Sequence[Sequence[str]], how: Reading) -> dict[str, Any] | None:
    """Cache key of the records of some files; None where nobody can tell when they change."""
    identities = [[identity_of(file) for file in files] for files in entries]
    if any(each is None for files in identities for each in files):
        return None
    functions = how.parse, how.asked, how.about
    code = code_digest(*filter(inspect.isfunction, (getattr(function, "func", function) for function in functions)))
    asked = how.split_seed if how.asked else None
    named = [*map(_named, functions), code]
    return {"files": identities, "how": [how.on_bad_record, how.fields, asked], "code": named}


def stored_records(
    entries: Sequence[Sequence[str]], how: Reading, key: dict[str, Any] | None, cache: Path
) -> Records[Any]:
    """The records of the files of some entries, in their order: what ``cache`` has by this :func:`records_key`, or
    written there now. Raises ``UserError`` as :func:`lit_rlhf.text.records.load_records` does."""
    folder = kept(cache, "records", key or {"files": entries}, partial(_write, entries, how), is_whole)
    return Records(folder, kinds_of(how.parse))


def _write(entries: Sequence[Sequence[str]], how: Reading, folder: Path) -> None:
    counts, skipped, known = [0] * len(entries), list[str](), list[list[Any]]()
    about: dict[str, None] = {}
    kinds = kinds_of(how.parse)

    def lines() -> Iterator[_Line]:
        for number, files in enumerate(entries):
            for file in files:
                seen = Seen()
                for record in read_records(file, how.parse, seen, how.on_bad_record, how.fields):
                    fingerprint, place = split_marks(how.asked(record), how.split_seed) if how.asked else (0, 0.0)
                    if how.about is not None:
                        about[json.dumps(how.about(record))] = None
                    counts[number] += 1
                    values = tuple(getattr(record, name) for name in field_names(type(record)))
                    signed = int.from_bytes(fingerprint.to_bytes(8, "big"), "big", signed=True)
                    yield _Line(kinds.index(type(record)), values, signed, place)
                skipped.extend(seen.skipped)
                known.append([file, {**vars(seen), "skipped": []}])

    try:
        write_rows(folder / "rows.arrow", _Line, progress(lines(), "reading", "records"))
    except NotPlain as error:
        where = entries[-1][-1]
        raise UserError(
            f"{where}: a record holds {error}, which is no text, number, list or object; leave out its column, or set "
            "data.cache=null"
        ) from None
    write_note(folder, {"entries": counts, "skipped": skipped, "seen": known, "about": list(map(json.loads, about))})


def write_note(folder: Path, note: dict[str, Any]) -> None:
    """Write the note of a folder: what is known of its ``rows.arrow``."""
    note = {**note, "bytes": (folder / "rows.arrow").stat().st_size}
    (folder / "note.json").write_text(json.dumps(note), encoding="utf-8")


def read_note(folder: Path) -> dict[str, Any]:
    """The note of a folder, as :func:`write_note` has written it."""
    return json.loads((folder / "note.json").read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def is_whole(folder: Path) -> bool:
    """Whether rows and note are there, as they were written."""
    try:
        return bool((folder / "rows.arrow").stat().st_size == read_note(folder)["bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _tuples(kind: Any) -> list[bool]:
    hints = typing.get_type_hints(kind)
    return [typing.get_origin(hints[name]) is tuple for name in field_names(kind)]


def _named(function: Any) -> Any:
    """A function by its name, with what is bound to it."""
    if isinstance(function, partial):
        return [_named(function.func), list(function.args), function.keywords]
    return function and f"{function.__module__}.{getattr(function, '__qualname__', function)}"
