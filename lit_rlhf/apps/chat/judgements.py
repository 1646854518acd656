"""What a person thinks of answers, on disk as soon as it is said: feedback and ranking records of a run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from lit_rlhf.errors import UserError


class Judgements:
    """Appends to ``feedback-<round>.jsonl`` and ``labels-<round>.jsonl``; others may append to them at the same time.

    Args:
        folder: ``data/`` of the run.
        round: of collection; the next reward model can be trained on it.
        annotator: who judges.
    """

    def __init__(self, folder: str | Path, *, round: Annotated[int, Field(ge=0)] = 0, annotator: str = "") -> None:
        self.folder, self.round, self.annotator = Path(folder), round, annotator

    @property
    def feedback_file(self) -> Path:
        """Thumbs."""
        return self.folder / f"feedback-{self.round}.jsonl"

    @property
    def labels_file(self) -> Path:
        """Choices between two answers."""
        return self.folder / f"labels-{self.round}.jsonl"

    def feedback(self, record: dict[str, Any]) -> str:
        """Keep a feedback record; returns its line, by which it can be taken back."""
        return _append(self.feedback_file, {**record, "annotator": self.annotator, "round": self.round})

    def ranking(self, record: dict[str, Any]) -> str:
        """Keep a ranking record."""
        return _append(self.labels_file, {**record, "annotator": self.annotator, "round": self.round})

    def take_back(self, line: str) -> None:
        """Remove a feedback record."""
        _blank(self.feedback_file, line)


def _append(path: Path, record: dict[str, Any]) -> str:
    line = json.dumps(record, ensure_ascii=False) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Appended by one write: another process's lines stand before or after it, never inside.
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            end = os.lseek(file, 0, os.SEEK_END)
            torn = end > 0 and os.pread(file, 1, end - 1) != b"\n"  # by a process that was killed
            os.write(file, (b"\n" if torn else b"") + line.encode())
            os.fsync(file)
        finally:
            os.close(file)
    except OSError as error:
        raise UserError(f"{path}: the judgement could not be written ({error.strerror}); nothing was kept") from None
    return line


def _blank(path: Path, line: str) -> None:
    """Overwrite a line by spaces, which readers skip: the lines after it stay where another process wrote them."""
    wanted = line.encode()
    with path.open("r+b") as file:
        at = file.read().rfind(wanted)
        if at >= 0:
            file.seek(at)
            file.write(b" " * (len(wanted) - 1))
            file.flush()
            os.fsync(file.fileno())
