"""Items on disk: rows of an Arrow file, of which those that are asked for are in memory, and no more."""

from __future__ import annotations

import copy
import json
import typing
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from itertools import islice
from pathlib import Path
from types import UnionType
from typing import Any, Generic, NamedTuple, Self, TypeVar, overload

import numpy as np
from tqdm import tqdm

Item = TypeVar("Item")

BATCH = 500  # rows that are written at a time
TAG = "lit_rlhf!"  # marks in JSON what it has no form for
# Name of a type -> (value -> text, text -> value): what Parquet has besides JSON's own.
_TEXTS: dict[str, tuple[Callable[[Any], str], Callable[[str], Any]]] = {
    "datetime": (datetime.isoformat, datetime.fromisoformat),
    "date": (date.isoformat, date.fromisoformat),
    "time": (time.isoformat, time.fromisoformat),
    "timedelta": (
        lambda value: str(value // timedelta(microseconds=1)),
        lambda text: timedelta(microseconds=int(text)),
    ),
    "Decimal": (str, Decimal),
    "bytes": (lambda value: b64encode(value).decode(), b64decode),
}


class NotPlain(ValueError):
    """A value that neither JSON nor Parquet can hold."""


class Rows(Sequence[Item], Generic[Item]):
    """The items that :func:`write_rows` has written into ``file``, in their order.

    Args:
        file: is opened when it is first read: a copy in another process opens its own.
        kind: the NamedTuple or dataclass that the items are.
        parts: into how many items each they are divided, where that means something.
    """

    def __init__(self, file: Path, kind: Callable[..., Item], parts: Sequence[int] = ()) -> None:
        self.file, self.kind, self.parts = file, kind, parts
        self.places: np.ndarray | None = None  # in the file; None: all of them
        self._opened: _Opened | None = None

    def __len__(self) -> int:
        return self._arrow.count if self.places is None else len(self.places)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> Item | Self:
        if isinstance(index, slice):
            return self.at(np.arange(len(self))[index])
        place = range(len(self))[index]
        return self._item(self._arrow.row(place if self.places is None else int(self.places[place])))

    def at(self, places: np.ndarray) -> Self:
        """Those of the items, by indices or by a mask."""
        part = copy.copy(self)
        part.places, part.parts = (np.arange(len(self)) if self.places is None else self.places)[places], ()
        return part

    def column(self, name: str) -> np.ndarray:
        """One number of each item."""
        values = self._arrow.column(name)
        return values if self.places is None else values[self.places]

    def _item(self, row: dict[str, Any]) -> Item:
        return self.kind(**{name: read(row[name]) for name, (_, _, read) in self._arrow.columns(self.kind).items()})

    @property
    def _arrow(self) -> _Opened:
        if self._opened is None:
            self._opened = _Opened(self.file)
        return self._opened

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}


class _Opened:
    """An Arrow file, mapped into memory."""

    def __init__(self, file: Path) -> None:
        import pyarrow

        read = pyarrow.ipc.open_file(pyarrow.memory_map(str(file)))
        self.batches = [read.get_batch(i) for i in range(read.num_record_batches)]
        self.count = sum(batch.num_rows for batch in self.batches)
        self._columns: dict[str, _Column] | None = None

    def row(self, place: int) -> dict[str, Any]:
        return self.batches[place // BATCH].slice(place % BATCH, 1).to_pylist()[0]  # type: ignore[no-any-return]

    def column(self, name: str) -> np.ndarray:
        return np.concatenate([batch.column(name).to_numpy() for batch in self.batches] or [np.empty(0)])

    def columns(self, kind: Any) -> dict[str, _Column]:
        if self._columns is None:
            self._columns = _columns(kind)
        return self._columns


def write_rows(
    file: Path, kind: Any, items: Iterable[Item], numbers: Mapping[str, Callable[[Item], int]] | None = None
) -> None:
    """Write items of ``kind``, with some numbers of each, for :class:`Rows`.

    Fields that hold numbers, texts, or lists of numbers are columns of that type, others are JSON. Raises
    :class:`NotPlain` where a value is none that JSON or Parquet can hold."""
    import pyarrow

    columns, left = _columns(kind), iter(items)
    types = {name: column.type for name, column in columns.items()}
    schema = pyarrow.schema([*types.items(), *((name, pyarrow.int64()) for name in numbers or {})])
    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_file(sink, schema) as out:
        while batch := list(islice(left, BATCH)):
            values = [[column.write(getattr(item, name)) for item in batch] for name, column in columns.items()]
            values += [[number(item) for item in batch] for number in (numbers or {}).values()]
            out.write_batch(
                pyarrow.record_batch([pyarrow.array(v, f.type) for v, f in zip(values, schema)], schema=schema)
            )


def progress(items: Iterable[Item], what: str, unit: str, total: int | None = None) -> Iterator[Item]:
    """The items, with a bar on a terminal where they take more than some seconds."""
    yield from tqdm(items, what, total, unit=f" {unit}", delay=5, disable=None)


class _Column(NamedTuple):
    type: Any
    write: Callable[[Any], Any]
    read: Callable[[Any], Any]


def _columns(kind: Any) -> dict[str, _Column]:
    hints = typing.get_type_hints(kind)
    return {name: _column(hints[name]) for name in field_names(kind)}


def field_names(kind: Any) -> Sequence[str]:
    """The fields of a NamedTuple or dataclass, in their order."""
    return getattr(kind, "_fields", None) or list(kind.__dataclass_fields__)


def _column(hint: Any) -> _Column:
    import pyarrow

    kinds = [k for k in typing.get_args(hint) if k is not type(None)]
    if typing.get_origin(hint) in (typing.Union, UnionType) and len(kinds) == 1:
        hint = kinds[0]
    if (found := _arrow_type(hint, pyarrow.int64())) is not None:
        return _Column(found, _same, _same)
    return _Column(pyarrow.binary(), _to_json, _from_json)


def _arrow_type(hint: Any, integer: Any) -> Any:
    """The type of a column; None where its values are written as JSON."""
    import pyarrow

    if typing.get_origin(hint) is list:
        inner = _arrow_type(typing.get_args(hint)[0], pyarrow.int32())  # tokens, ranks
        return None if inner is None else pyarrow.list_(inner)
    plain = {int: integer, float: pyarrow.float64(), bool: pyarrow.bool_(), str: pyarrow.string()}
    return plain.get(hint)


def _same(value: Any) -> Any:
    return value


def _to_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, default=_tagged).encode(errors="surrogatepass")


def _from_json(data: bytes) -> Any:
    return json.loads(data.decode(errors="surrogatepass"), object_hook=_untagged if TAG.encode() in data else None)


def _tagged(value: Any) -> dict[str, str]:
    name = next((kind.__name__ for kind in type(value).__mro__ if kind.__name__ in _TEXTS), None)
    if name is None:
        raise NotPlain(f"a {type(value).__name__}")
    return {TAG: name, "text": _TEXTS[name][0](value)}


def _untagged(value: dict[str, Any]) -> Any:
    return _TEXTS[value[TAG]][1](value["text"]) if TAG in value else value
