"""What is finished of a long collection, on disk."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lit_rlhf.errors import UserError


class ProgressFile:
    """Results by key (the number of a batch, say): one line of JSON each, written as they come.

    Args:
        path: the file; None keeps the results in memory only.
    """

    def __init__(self, path: str | Path | None) -> None:
        self.path = None if path is None else Path(path)
        self.results: dict[Any, Any] = {}
        if self.path is None or not self.path.exists():
            return
        *lines, half = self.path.read_bytes().split(b"\n")
        if half:  # the line that was being written when the process was killed; it is written anew
            os.truncate(self.path, self.path.stat().st_size - len(half))
        for number, line in enumerate(lines, 1):
            try:
                key, result, *_ = json.loads(line)
                self.results[key] = result
            except (ValueError, TypeError):
                raise UserError(
                    f"{self.path}, line {number}: damaged, [key, result] in JSON was expected; delete the line, and "
                    "its result is made again"
                ) from None

    def add(self, key: Any, result: Any, *remarks: Any) -> None:
        """Keep a result; ``remarks`` stand behind it in the file, for people."""
        self.results[key] = result
        self._append(json.dumps([key, result, *remarks]) + "\n")

    def remove(self) -> None:
        """Delete the file; what it held stays in memory."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _append(self, text: str) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
