"""A file of records that several programs write: what was appended is on disk, and nobody's lines are touched."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from lit_rlhf.errors import UserError
from lit_rlhf.files import damaged, json_value, read_bytes


class RecordFile:
    """JSON lines in the order in which they came. Each step looks at the file as it is, alone for that moment.

    A last line without its end was being written when its program was killed, and nobody was told that it was kept: it
    is cut off. Where it is a whole record, a person's editor left it so, and it stays."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> list[dict[str, Any]]:
        """All records, whoever wrote them. Raises ``UserError``, naming the line, where one is none."""
        if not self.path.exists():
            return []
        with self._alone("not read"):
            lines = self._whole_lines().split(b"\n")
        return [self._parsed(line, number) for number, line in enumerate(lines, start=1) if line.strip()]

    def append(self, record: dict[str, Any]) -> None:
        """Add a record; when this returns, it is on disk. Raises ``UserError`` where it cannot be, and adds nothing."""
        line = _line(record)
        with self._alone("not saved"):
            self._whole_lines()
            new = not self.path.exists()
            with self.path.open("ab", buffering=0) as file:
                before = file.tell()
                try:
                    written = 0
                    while written < len(line):
                        written += file.write(line[written:])
                    os.fsync(file.fileno())
                except OSError:
                    os.truncate(self.path, before)  # no half line for the next one to be glued to
                    raise
            if new:
                _sync_folder(self.path.parent)

    def remove(self, record: dict[str, Any], successor: dict[str, Any] | None = None) -> None:
        """Take the last such record out again, and append another; both happen or none does.

        The file is written anew beside the old one, then renamed."""
        # As it comes back from the file: with lists for tuples.
        target = json.loads(_line(record))
        with self._alone("not changed"):
            lines = self._whole_lines().splitlines(keepends=True)
            place = next((i for i in reversed(range(len(lines))) if _holds(lines[i], target)), None)
            if place is None and successor is None:  # someone else has taken it out
                return
            temporary = self.path.with_name(self.path.name + ".tmp")
            with temporary.open("wb") as file:
                file.writelines(line for i, line in enumerate(lines) if i != place)
                file.write(_line(successor) if successor else b"")
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)
            _sync_folder(self.path.parent)

    @contextmanager
    def _alone(self, what: str) -> Iterator[None]:
        """While nobody else reads or writes; what the disk refuses becomes a ``UserError``."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path.with_name(f".{self.path.name}.lock")):
                yield
        except OSError as error:
            raise UserError(f"{self.path}: {what} ({error.strerror}); make room or fix it, then try again") from None

    def _whole_lines(self) -> bytes:
        """All lines, each with its end."""
        data = read_bytes(self.path) or b""
        whole = data.rfind(b"\n") + 1
        if whole == len(data):
            return data
        try:
            json_value(data[whole:].decode("utf-8"))
        except ValueError:
            os.truncate(self.path, whole)
            return data[:whole]
        with self.path.open("ab") as file:
            file.write(b"\n")
        return data + b"\n"

    def _parsed(self, line: bytes, number: int) -> dict[str, Any]:
        cure = "fix the line, or move the file away and start again"
        try:
            record = json_value(line.decode("utf-8"))
            if not isinstance(record, dict):
                raise ValueError("an object with named fields was expected")
        except ValueError as error:
            raise damaged(self.path, f"not a record: {error}", number, cure) from None
        return record


def _line(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, ensure_ascii=False, default=str) + "\n").encode()


def _holds(line: bytes, record: dict[str, Any]) -> bool:
    try:
        return bool(json_value(line.decode("utf-8")) == record)
    except ValueError:
        return False


def _sync_folder(folder: Path) -> None:
    """A new name is on disk only when its folder is; Windows cannot open folders and needs no such call."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
