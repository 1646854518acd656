"""What is finished of a long collection, on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Journal:
    """The results of batches, by their number: one line of JSON each, written as they come.

    Args:
        path: the file; None keeps the results in memory only.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.batches: dict[int, Any] = {}
        if path is None or not path.exists():
            return
        for line in path.read_text(encoding="utf-8").split("\n"):
            try:
                index, result = json.loads(line)
            except ValueError:  # the line that was being written when the process was killed
                break
            self.batches[index] = result
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(_line(i, result) for i, result in self.batches.items()), encoding="utf-8")
        temporary.replace(path)

    def add(self, index: int, result: Any) -> None:
        """Keep the result of a batch."""
        self.batches[index] = result
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(index, result))

    def remove(self) -> None:
        """Take the file away; what it held stays in memory."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def _line(index: int, result: Any) -> str:
    return json.dumps([index, result], ensure_ascii=False) + "\n"
