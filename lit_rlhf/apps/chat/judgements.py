"""Feedback and ranking records of a chat, written to disk as they are given."""

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
        """The file of thumbs."""
        return self.folder / f"feedback-{self.round}.jsonl"

    @property
    def labels_file(self) -> Path:
        """The file of choices between two answers."""
        return self.folder / f"labels-{self.round}.jsonl"

    def feedback(self, record: dict[str, Any], earlier: dict[str, Any] | None = None) -> dict[str, Any]:
        """Keep a feedback record, in place of an earlier one; returns it as it was kept, for ``take_back``."""
        kept = self._of_person(record)
        if earlier:
            RecordFile(self.feedback_file).remove(earlier, kept)
        else:
            RecordFile(self.feedback_file).append(kept)
        return kept

    def ranking(self, record: dict[str, Any]) -> None:
        """Keep a ranking record."""
        RecordFile(self.labels_file).append(self._of_person(record))

    def take_back(self, kept: dict[str, Any]) -> None:
        """Remove a feedback record."""
        RecordFile(self.feedback_file).remove(kept)

    def thumbs(self) -> list[dict[str, Any]]:
        """The person's feedback records so far."""
        return [kept for kept in RecordFile(self.feedback_file).read() if kept.get("annotator") == self.annotator]

    def _of_person(self, record: dict[str, Any]) -> dict[str, Any]:
        return {**record, "annotator": self.annotator, "round": self.round}
