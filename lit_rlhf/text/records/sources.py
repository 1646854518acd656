"""Where records come from: files, folders and patterns, on this machine or wherever ``fsspec`` reaches, and the Hub."""

from __future__ import annotations

import glob
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Required
from urllib.parse import parse_qsl, urlencode

from pydantic import ConfigDict
from typing_extensions import TypedDict  # pydantic cannot check that of Python 3.11

from lit_rlhf.errors import UserError, first_line, say_hub

FORMATS = (".jsonl", ".json", ".csv", ".parquet", ".txt")
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}  # as pyarrow calls them
# What a file system says of a file that changes with what is in it.
MARKS = {"ETag", "etag", "mtime", "LastModified", "last_modified", "blob_id", "last_commit", "md5Hash", "created"}


class HubData(TypedDict, total=False):
    """A data set on the Hub."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]

    path: Required[str]  # its name there, "user/data"
    name: str  # which of its configurations
    split: str  # "train" where nothing is said; "train[:10%]" is a part of it
    revision: str  # a branch, tag or commit
    columns: list[str]  # those that are read; all where nothing is said
    streaming: bool  # read as they are asked for, and not kept on disk


Source = str | Path | HubData
Paths = Source | Sequence[Source]


def files_of(path: Paths) -> list[str]:
    """The files that a path names: its own, those of a folder or of a pattern (``*``, ``?``, ``**``), here or at an
    address (``s3://``, ``hf://``); of a list, those of each. Data sets of the Hub stay names, ``user/data?split=test``.

    Raises ``UserError`` where there are none in a folder, or none matches a pattern."""
    if isinstance(path, Mapping):
        return [_hub_name(path)]
    if not isinstance(path, str | Path):
        return [file for one in path for file in files_of(one)]
    if _hub_query(str(path)) is not None:
        return [str(path)]
    return _remote_files(path) if isinstance(path, str) and "://" in path else _local_files(path)


def entries_of(path: Paths) -> list[list[str]]:
    """The files of each entry of a list; where ``path`` is no list, each of its files is one."""
    if isinstance(path, str | Path | Mapping):
        return [[file] for file in files_of(path)]
    return [files_of(one) for one in path]


def _local_files(path: str | Path) -> list[str]:
    whole = Path(path).expanduser()
    if _is(whole, Path.is_dir):
        names = sorted(str(file) for file in whole.rglob("*") if not file.name.startswith(".") and file.is_file())
        return _records_among(path, names)
    if not glob.has_magic(str(path)) or _is(whole, Path.exists):
        return [str(path)]
    if not (found := sorted(glob.glob(str(whole), recursive=True))):
        raise UserError(f"{path}: no file matches (the current folder is {Path.cwd()})")
    return found


def _remote_files(path: str) -> list[str]:
    if not glob.has_magic(path) and format_of(path) in FORMATS:
        return [path]
    with _reading(path):
        system, place = _file_system(path)
        if glob.has_magic(path):
            found = sorted(map(system.unstrip_protocol, system.glob(place)))
        else:
            found = _records_among(path, sorted(map(system.unstrip_protocol, system.find(place))))
    if not found:
        raise UserError(f"{path}: no file matches")
    return found


def _records_among(folder: str | Path, names: Sequence[str]) -> list[str]:
    if not (found := [name for name in names if format_of(name) in FORMATS]):
        raise UserError(f"{folder}: a folder without files of records ({', '.join(FORMATS)}, or one of these as .gz)")
    return found


def _is(file: Path, what: Any) -> bool:
    try:
        return bool(what(file))
    except (OSError, ValueError):  # a name that is too long, or holds a zero
        return False


def format_of(path: str | Path) -> str:
    """The suffix that says how a file is written, ``.jsonl``; of a compressed one that before ``.gz``."""
    name = Path(path)
    return (name.with_suffix("") if name.suffix.lower() in COMPRESSED else name).suffix.lower()


def readable(path: str) -> str:
    """The name of a file as messages have it. Raises ``UserError`` where it is not there, or none that can be read."""
    if "://" in path:
        return path
    file = Path(path).expanduser()
    if not _is(file, Path.exists):
        raise UserError(f"{path}: no such file (the current folder is {Path.cwd()})")
    if not file.is_file():
        what = "a folder" if file.is_dir() else "a pipe or a device"
        raise UserError(f"{path}: is {what}; a file was expected ({', '.join(FORMATS)})")
    return str(file)


@contextmanager
def opened(path: str | Path) -> Iterator[BinaryIO]:
    """The bytes of a file, here or at an address, those of a compressed one unpacked.

    Raises ``UserError`` with its name for what its disk or its server says."""
    kind = COMPRESSED.get(Path(path).suffix.lower())
    with _reading(path), _raw(path) as raw:
        if kind is None:
            yield raw
        else:
            import pyarrow  # reads Zstandard, too, which Python does not from 3.11 on

            yield io.BufferedReader(pyarrow.CompressedInputStream(raw, kind))


@contextmanager
def _raw(path: str | Path) -> Iterator[Any]:
    if "://" in str(path):
        system, place = _file_system(str(path))
        with system.open(place, "rb") as file:
            yield io.BufferedReader(file, 2**20)
    else:
        with Path(path).expanduser().open("rb") as file:
            yield file


def _file_system(path: str) -> tuple[Any, str]:
    """The file system of an address, and the place there."""
    import fsspec

    return fsspec.core.url_to_fs(path)  # type: ignore[no-any-return]


@contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and "://" not in str(path):  # file systems elsewhere have errors of any kind
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)
        raise UserError(f"{path}: cannot be read ({reason})") from None


def identity_of(path: str) -> list[Any] | None:
    """Plain values that change when what is in a source does; None where nobody can tell."""
    if is_hub_name(path):
        kept = getattr(hub_rows(path), "cache_files", None)  # named by the commit
        return kept and [path, [file["filename"] for file in kept]]
    if "://" in path:
        with _reading(path):
            system, place = _file_system(path)
            said = {name: str(value) for name, value in system.info(place).items() if name in MARKS | {"size"}}
        return [path, said] if said.keys() & MARKS else None
    file = Path(path).expanduser()
    if not file.is_file():
        return None
    known = file.stat()
    return [str(file.resolve()), known.st_size, known.st_mtime_ns]


def is_hub_name(path: str) -> bool:
    """Whether a path is the name of a data set on the Hub, for it is no file here."""
    if _is(Path(path).expanduser(), Path.exists):
        return False
    plain = re.fullmatch(r"[\w.-]+/[\w.-]+", path) and format_of(path) not in FORMATS
    return bool(plain) or _hub_query(path) is not None


def _hub_name(data: Mapping[str, Any]) -> str:
    said = {key: ",".join(value) if key == "columns" else value for key, value in data.items() if key != "path"}
    return f"{data['path']}?{urlencode({'split': 'train', **said}, safe='[]:,%/')}"


def _hub_query(path: str) -> dict[str, str] | None:
    """What is said of a data set behind its name on the Hub; None where this is no such name."""
    _, _, query = path.partition("?")
    said = dict(parse_qsl(query))
    return said if re.fullmatch(r"[\w.-]+(/[\w.-]+)?\?.*", path) and said.keys() & HubData.__annotations__ else None


@lru_cache(maxsize=4)
def hub_rows(path: str) -> Any:
    """A data set of the Hub, as ``datasets`` keeps it on disk."""
    from datasets import load_dataset  # imported here: it takes longer than everything else together

    if not Path(path.partition("?")[0]).exists():
        say_hub(path)
    settings = _hub_query(path) or {}
    columns, streaming = settings.pop("columns", ""), settings.pop("streaming", "") == "True"
    try:
        rows = load_dataset(path.partition("?")[0], **{"split": "train", **settings}, streaming=streaming)
        return rows.select_columns(columns.split(",")) if columns else rows
    except Exception as error:  # network, name, configuration: the library has many kinds
        raise UserError(
            f"{path}: no such file here, and as a Hub data set it could not be loaded ({first_line(error)}). Offline: "
            "download it elsewhere and give the path of the file."
        ) from None
