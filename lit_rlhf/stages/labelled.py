"""Labelled records and open questions: where classification and few-shot take their tasks from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lit_rlhf.stages.records import RecordDataModule
from lit_rlhf.text.records import task_prompt


class TaskDataModule(RecordDataModule):
    """The tasks of ``path``, read by ``parse_record``; what is held out is decided by their (first) text."""

    parse_record: Callable[[dict[str, Any]], Any]

    def records(self) -> tuple[list[Any], list[Any]]:
        """(train, held out)."""
        return self.split(self.load(self.path, self.parse_record), task_prompt)


class WorldTasks:
    """The task ``world_task`` of ``world`` in place of a file's: ``examples`` of it to train on, 400 held out."""

    def records(self) -> tuple[list[Any], list[Any]]:
        return tuple(
            [
                self.parse_record(row)
                for row in self.world.tasks(self.world_task, n, self.split_seed, split, self.split_seed)
            ]
            for split, n in (("train", self.examples), ("held_out", 400))
        )
