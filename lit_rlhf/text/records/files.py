"""Records as they stand in files: JSONL, JSON, CSV, Parquet, plain text, or on the Hub; bad ones named by line."""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from lit_rlhf.errors import UserError
from lit_rlhf.files import json_value, make_folder, written_anew
from lit_rlhf.text.label_studio import is_other_format, is_task, rankings_of_task
from lit_rlhf.text.records.fields import Row, remark, short
from lit_rlhf.text.records.sources import COMPRESSED, FORMATS, format_of, hub_rows, is_hub_name, opened, readable

NULLS = (
    "nulls inside calls and tools stand in what models read; a file that was written from a table has them for fields "
    "of other calls: take the table itself (.parquet)"
)
OnBadRecord = Literal["fail", "skip"]
Record = TypeVar("Record")


@dataclass
class Seen:
    """Notes taken while a file is read."""

    skipped: list[str] = field(default_factory=list)  # a line for each bad record
    unread: dict[str, None] = field(default_factory=dict)  # fields that nobody asked for, in their order
    passed_on: dict[str, None] = field(default_factory=dict)  # fields of messages that only a chat template may read
    remarks: dict[str, int] = field(default_factory=dict)  # what was made of records -> of how many
    found: dict[str, None] = field(default_factory=dict)  # our names of fields that some record has under another name
    there: dict[str, None] = field(default_factory=dict)  # names of the first record's fields


@dataclass(frozen=True)
class Loaded(Generic[Record]):
    """The good records of a source, and the notes taken while it was read."""

    records: list[Record]
    seen: Seen

    @property
    def skipped(self) -> list[str]:
        """A line for each record that was skipped."""
        return self.seen.skipped

    @property
    def unread(self) -> list[str]:
        """The fields that nobody reads."""
        return [*self.seen.unread]

    @property
    def passed_on(self) -> list[str]:
        """The fields of messages that only a chat template may read."""
        return [*self.seen.passed_on]


def load_records(
    path: str | Path,
    parse: Callable[[dict[str, Any]], Record],
    on_bad_record: OnBadRecord = "fail",
    fields: Mapping[str, str] | None = None,
) -> Loaded[Record]:
    """Read every record of ``path``: a .jsonl, .json, .csv, .parquet or .txt file, or a Hub data set's name.

    ``fields`` says which names the file has for ours, see :class:`Row`. The text formats are read here rather than
    through ``datasets``, which cannot say on which line a record is bad; Parquet and the Hub go through it. Raises
    ``UserError`` naming file, line and reason, unless ``on_bad_record`` is "skip"; also when nothing valid is left."""
    seen = Seen()
    records = list(read_records(path, parse, seen, on_bad_record, fields))
    return Loaded(records, seen)


def read_records(
    path: str | Path,
    parse: Callable[[dict[str, Any]], Record],
    seen: Seen,
    on_bad_record: OnBadRecord = "fail",
    fields: Mapping[str, str] | None = None,
) -> Iterator[Record]:
    """The records of :func:`load_records` one by one; ``seen`` takes what is to be known of the others.

    Lines of .jsonl and rows of .parquet are read as they are asked for: the file may be larger than memory."""
    valid = False
    calls = {"tools", "tool_calls", "function_call", (fields or {}).get("tools", "").rpartition(".")[2]}
    for place, values in _rows(str(path), calls):
        try:
            if isinstance(values, Exception):
                raise values
            if not isinstance(values, dict):
                raise ValueError(f"{short(values)} is not a record; an object with named fields was expected")
            row = Row(values, fields)
            seen.there = seen.there or dict.fromkeys(map(str, values))
            seen.found.update(dict.fromkeys(row.found))
            record = parse(row)
        except ValueError as error:
            bad_record(place, str(error), seen.skipped, on_bad_record)
        else:
            valid = True
            if _has_nulls(values, calls):
                remark(row, NULLS)
            seen.unread.update(dict.fromkeys(row.unread()))
            seen.passed_on.update(dict.fromkeys(row.passed_on()))
            seen.remarks.update({line: seen.remarks.get(line, 0) + 1 for line in row.remarks})
            yield _placed(record, place)
    if not valid:
        why = f"; the first of {len(seen.skipped)} bad ones is {seen.skipped[0]}" if seen.skipped else ": it is empty"
        raise UserError(f"{path}: no valid record{why}")


def bad_record(place: str, reason: str, skipped: list[str], on_bad_record: OnBadRecord) -> None:
    """Raise ``UserError``, or where ``on_bad_record`` is "skip" note a line down."""
    if on_bad_record == "fail":
        raise UserError(f"{place}: {reason}. Fix it, or set on_bad_record=skip (<stage>.data.on_bad_record).") from None
    skipped.append(f"{place}: {reason}")


def _placed(record: Any, place: str) -> Any:
    """The record with file and line, where it is of a kind that keeps them."""
    if not hasattr(record, "place"):
        return record
    return record._replace(place=place) if hasattr(record, "_replace") else replace(record, place=place)


PIECE = 2**16  # characters


def read_pieces(path: str | Path) -> Iterator[str]:
    """A .txt file in pieces of ``PIECE`` characters or some more; a shorter one is one piece.

    A piece ends behind a line break, or before a space, that stands between a visible character and a letter or digit:
    a tokenizer that splits at words (any byte-level BPE, characters) makes of the pieces what it makes of the whole."""
    file = readable(str(path))
    decode = codecs.getincrementaldecoder("utf-8-sig")()
    text, lines, blank = "", 1, True
    with opened(file) as source:
        while block := source.read(PIECE):
            try:
                text += decode.decode(block)
            except UnicodeDecodeError as error:
                raise _not_unicode(file, lines + error.object.count(b"\n", 0, error.start), error) from None
            lines += block.count(b"\n")
            if len(text) > PIECE and (cut := _between_words(text)):
                blank = blank and not text[:cut].strip()
                yield text[:cut]
                text = text[cut:]
    try:
        decode.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise _not_unicode(file, lines, error) from None
    if blank and not text.strip():
        raise UserError(f"{path}: no valid record: it is empty")
    if text:
        yield text


def _between_words(text: str) -> int:
    """The last such place in the last piece of ``text``; 0 where there is none."""
    for mark in ("\n", " "):
        at = len(text)
        while (at := text.rfind(mark, len(text) - PIECE, at)) > 0:
            if not text[at - 1].isspace() and text[at + 1 : at + 2].isalnum():
                return at + (mark == "\n")
    return 0


def _rows(path: str, calls: Collection[str]) -> Iterator[tuple[str, Any]]:
    """(place, row) of every row; a row that cannot be decoded comes as the ``ValueError`` that says why.

    ``calls``: fields whose objects differ in what they hold; Arrow gives each the fields of all, and null."""
    if is_hub_name(path):
        for number, row in enumerate(hub_rows(path), start=1):
            yield f"{path}: record {number}", _without_nulls(row, calls)
        return
    file = readable(path)
    reader = _READERS.get(format_of(file))
    if reader is None or (reader is _parquet_rows and Path(file).suffix.lower() in COMPRESSED):
        raise UserError(f"{path}: cannot tell its format from {Path(file).suffix!r}; use one of {', '.join(FORMATS)}")
    if reader is _parquet_rows:
        yield from ((place, _without_nulls(row, calls)) for place, row in reader(file))
    else:
        yield from reader(file)


def _has_nulls(value: Any, fields: Collection[str]) -> bool:
    """Whether :func:`_without_nulls` would leave out any."""
    try:
        return bool(_without_nulls(value, fields) != value)
    except RecursionError:  # nested deeply, in a field that nobody reads
        return False


def _without_nulls(value: Any, fields: Collection[str], inside: bool = False) -> Any:
    """A value without the nulls of objects inside ``fields``, at all depths."""
    if isinstance(value, list):
        return [_without_nulls(each, fields, inside) for each in value]
    if not isinstance(value, dict):
        return value
    kept = ((name, each) for name, each in value.items() if not inside or each is not None)
    return {name: _without_nulls(each, fields, inside or name in fields) for name, each in kept}


def _read_text(file: str) -> str:
    with opened(file) as source:
        data = source.read()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_unicode(file, data.count(b"\n", 0, error.start) + 1, error) from None


def _not_unicode(file: str | Path, line: int, error: UnicodeDecodeError) -> UserError:
    byte = error.object[error.start]
    with opened(file) as begin:
        was = "utf-16" if begin.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "latin1"
    return UserError(f"{file}:{line}: not UTF-8 (byte 0x{byte:02x}); save it as UTF-8 (iconv -f {was} -t utf-8)")


def _jsonl_rows(file: str) -> Iterator[tuple[str, Any]]:
    with opened(file) as lines:
        for number, data in enumerate(lines, start=1):
            try:
                line = data.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise _not_unicode(file, number, error) from None
            if line.strip():
                try:
                    yield f"{file}:{number}", _writable(json_value(line), line)
                except ValueError as error:
                    yield f"{file}:{number}", error


def _json_rows(file: str) -> Iterator[tuple[str, Any]]:
    text = _read_text(file)
    if not text.strip():
        return
    try:
        rows = json_value(text)
    except ValueError as error:
        lines = "; one record per line is JSONL: name it .jsonl" if _is_json(text.strip().partition("\n")[0]) else ""
        raise UserError(f"{file}:{_bad_line(text)}: {error}{lines}") from None
    if not isinstance(rows, list):
        raise UserError(f"{file}: holds {short(rows)}; a list of records was expected")
    if rows and all(map(is_task, rows)):
        yield from _label_studio_rows(file, rows)
        return
    if rows and all(map(is_other_format, rows)):
        raise UserError(f"{file}: tasks of Label Studio, or an export of another format; export the project as JSON")
    for number, row in enumerate(rows, start=1):
        yield f"{file}: record {number}", _writable(row, text)


def _is_json(text: str) -> bool:
    try:
        return isinstance(json_value(text), dict)
    except ValueError:
        return False


def _bad_line(text: str) -> int:
    """The line of what :func:`json_value` does not take: where it is wrong, a number too long, the deepest place."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.lineno
    except RecursionError:
        depth, deepest, at = 0, 0, 0
        for place, character in enumerate(text):
            depth += (character in "[{") - (character in "]}")
            if depth > deepest:
                deepest, at = depth, place
    except ValueError:
        at = max(re.finditer(r"\d+", text), key=lambda match: len(match[0])).start()
    return text.count("\n", 0, at) + 1


def _label_studio_rows(file: str, tasks: list[dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    """A ranking for each person who judged a task of a Label Studio export."""
    judged = False
    for number, task in enumerate(tasks, start=1):
        place = f"{file}: task {task.get('id', number)}"
        try:
            for row in rankings_of_task(task):
                judged = True
                yield place, _writable(row, "\\u")
        except ValueError as error:
            judged = True
            yield place, error
    if not judged:
        what = f"{len(tasks)} tasks, and none is judged (all open or skipped)"
        raise UserError(f"{file}: {what}; label some, then export again")


def _writable(row: Any, source: str) -> Any:
    """The row, or the ``ValueError`` that its text is not Unicode: half of a pair of surrogates."""
    if "\\u" in source:
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except RecursionError:
            return ValueError("lists or objects in each other, hundreds deep")
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])
            return ValueError(f"holds half a character ({half}), as a text that was cut inside an emoji does")
    return row


def _csv_rows(file: str) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # characters; texts may be longer than its 131,072
    reader = csv.DictReader(io.StringIO(_read_text(file), newline=""), strict=True)
    while True:
        first = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:  # a quote that is never closed, say
            yield f"{file}:{first}", ValueError(f"not CSV ({error})")
            continue
        if row is None:
            return
        if None in row or None in row.values():
            yield f"{file}:{reader.line_num}", ValueError(f"not as many fields as the header ({reader.fieldnames})")
        else:
            yield f"{file}:{reader.line_num}", row


def _txt_rows(file: str) -> Iterator[tuple[str, Any]]:
    text = _read_text(file)
    if text.strip():
        yield f"{file}:1", {"text": text}


def _parquet_rows(file: str) -> Iterator[tuple[str, Any]]:
    from datasets import Dataset  # imported here: it takes longer than everything else together

    try:
        rows = Dataset.from_parquet(file)
    except Exception as error:  # pyarrow has many kinds
        raise UserError(f"{file}: not a Parquet file ({error})".splitlines()[0]) from None
    for number, row in enumerate(rows, start=1):
        yield f"{file}: record {number}", row


_READERS: dict[str, Callable[[str], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
    ".txt": _txt_rows,
}


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON lines: the whole file or none of it."""
    make_folder(path.parent)
    with written_anew(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
