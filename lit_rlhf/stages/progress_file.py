"""Finished results of a long collection, on disk."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lit_rlhf.files import damaged, disk, json_value, read_bytes
from lit_rlhf.processes import is_main_process


class ProgressFile:
    """Results by key (the number of a batch, say): one line of JSON each, written as they come.

    Of several processes each reads it, and the first one writes.

    Args:
        path: the file; None keeps the results in memory only.
        kind: of key and result, as types have it: ``tuple[int, list[str]]``.
        by_all: every process has a file of its own, and writes it.
    """

    def __init__(self, path: str | Path | None, kind: Any = tuple[Any, Any], by_all: bool = False) -> None:
        self.path = None if path is None else Path(path)
        self._writes = by_all or is_main_process()
        self.results: dict[Any, Any] = {}
        data = None if self.path is None else read_bytes(self.path)
        if self.path is None or data is None:
            return
        *lines, half = data.split(b"\n")
        if half and self._writes:  # the line that was being written when the process was killed; it is written anew
            os.truncate(self.path, len(data) - len(half))
        expected = TypeAdapter(kind)
        for number, line in enumerate(lines, 1):
            try:
                key, result = json_value(line.decode("utf-8"))[:2]
                expected.validate_python((key, result))
                self.results[key] = result
            except (ValueError, TypeError, KeyError) as error:
                first = error.errors()[0] if isinstance(error, ValidationError) else None
                reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else str(error)
                cure = "delete the line, and its result is made again"
                raise damaged(self.path, f"[key, result] in JSON was expected; {reason}", number, cure) from None

    def add(self, key: Any, result: Any, *remarks: Any) -> None:
        """Keep a result; ``remarks`` stand behind it in the file, for people."""
        lost = [] if self.path is None or self.path.exists() else self.results.items()  # with its folder
        lines = [*lost, (key, result, *remarks)]
        self.results[key] = result
        self._append("".join(json.dumps(line) + "\n" for line in lines))

    def remove(self) -> None:
        """Delete the file; what it held stays in memory."""
        if self.path is not None and self._writes:
            with disk(self.path):
                self.path.unlink(missing_ok=True)

    def _append(self, text: str) -> None:
        if self.path is not None and self._writes:
            with disk(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(text)
