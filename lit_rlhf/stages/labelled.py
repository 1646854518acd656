"""Tasks of the built-in world, for classification and few-shot."""

from __future__ import annotations

from typing import Any


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
