"""What a person thinks of answers, on disk as soon as it is said: feedback and ranking records of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from lit_rlhf.apps.record_file import RecordFile


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

    def feedback(self, record: dict[str, Any]) -> dict[str, Any]:
        """Keep a feedback record; returns it as it was kept, so that it can be taken back."""
        return self._keep(self.feedback_file, record)

    def ranking(self, record: dict[str, Any]) -> None:
        """Keep a ranking record."""
        self._keep(self.labels_file, record)

    def take_back(self, kept: dict[str, Any]) -> None:
        """Remove a feedback record."""
        RecordFile(self.feedback_file).remove(kept)

    def _keep(self, file: Path, record: dict[str, Any]) -> dict[str, Any]:
        kept = {**record, "annotator": self.annotator, "round": self.round}
        RecordFile(file).append(kept)
        return kept
