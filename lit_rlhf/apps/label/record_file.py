"""A file of records that is never behind: what was appended is on disk."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lit_rlhf.errors import UserError


class RecordFile:
    """JSON lines, in the order in which they came. One process at a time may write.

    A last line without its end was being written when the process was killed, and nobody was told that it was kept:
    it is cut off."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        data = path.read_bytes() if path.is_file() else b""
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(path, whole)
        for number, line in enumerate(data[:whole].split(b"\n"), start=1):
            if line.strip():
                self.records.append(self._parsed(line, number))

    def _parsed(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            record = json.loads(line)
            if not {"item", "turn", "annotator"} <= record.keys():
                raise ValueError("no 'item', 'turn' and 'annotator' among its fields")
        except (ValueError, AttributeError) as error:
            raise UserError(
                f"{self.path}:{number}: not a record of the labelling page ({error}). Mend the line, or move the file "
                "away and start again"
            ) from None
        return record

    def append(self, record: dict[str, Any]) -> None:
        """Add a record; when this returns, it is on disk. Raises ``UserError`` where it cannot be, and adds nothing."""
        line = (json.dumps(record, ensure_ascii=False, default=str) + "\n").encode()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
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
        except OSError as error:
            raise UserError(
                f"{self.path}: not saved ({error.strerror}); make room or mend it, then try again"
            ) from None
        self.records.append(record)

    def remove(self, record: dict[str, Any]) -> None:
        """Take a record out again: the file is written anew beside the old one, then renamed."""
        kept = [r for r in self.records if r is not record]
        temporary = self.path.with_name(self.path.name + ".tmp")
        try:
            with temporary.open("wb") as file:
                file.writelines((json.dumps(r, ensure_ascii=False, default=str) + "\n").encode() for r in kept)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path)
            _sync_folder(self.path.parent)
        except OSError as error:
            raise UserError(
                f"{self.path}: not changed ({error.strerror}); make room or mend it, then try again"
            ) from None
        self.records = kept


def _sync_folder(folder: Path) -> None:
    """A new name is on disk only when its folder is; Windows cannot open folders and needs no such call."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
