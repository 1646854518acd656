"""The built-in world in the place of files: what data modules that read it have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field

from lit_rlhf.text.world import World


@dataclass(eq=False, repr=False, init=False)
class WorldFirst:
    """The last base of a data module of the world: its ``world`` is then the first argument."""

    world: World


@dataclass(eq=False, repr=False, init=False)
class WithoutRecordSettings:
    """The first base of a data module of the world: it has none of the settings for other people's records."""

    held_out: ClassVar[float] = 0.1
    special_tokens: ClassVar[str] = "plain"
    on_bad_record: ClassVar[str] = "fail"
    fields: ClassVar[None] = None
    weights: ClassVar[None] = None
    cache: ClassVar[None] = None


@dataclass(eq=False, repr=False, init=False)
class WithoutFiles(WithoutRecordSettings):
    """The same, of a data module that reads no file at all."""

    path: ClassVar[str] = "world"


@dataclass(eq=False, repr=False, init=False, kw_only=True)
class WorldTasks(WithoutFiles):
    """The first base of a data module whose records are one of the world's labelled tasks.

    Args:
        task: which one.
        examples: different ones to train on, fewer where the world has no more; 400 are held out.
    """

    task: str = "choice"
    examples: Annotated[int, Field(ge=16)] = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        self.world_task = self.task  # later on that is the kind of task

    def records(self) -> tuple[list[Any], list[Any]]:
        return tuple(
            [
                self.parse_record(row)
                for row in self.world.tasks(self.world_task, n, self.split_seed, split, self.split_seed)
            ]
            for split, n in (("train", self.examples), ("held_out", 400))
        )
