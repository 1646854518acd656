"""Held-out prompts to be graded on, and held-out text to be read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field

from lit_rlhf.stages.prompts import PromptBatch, PromptDataModule, held_out_records
from lit_rlhf.stages.world import WithoutFiles, WorldFirst
from lit_rlhf.text.records import Messages, Paths, PromptRecord, parse_text
from lit_rlhf.training.batches import BatchLoader


@dataclass(eq=False, repr=False, kw_only=True)
class EvaluateDataModule(PromptDataModule):
    """The held-out prompts of a file.

    Args:
        text: files of text that no model was trained on (.txt, or records with a field ``text``), for the perplexity;
            None: it is not measured.

    The others are those of :class:`PromptDataModule`, but for what concerns training."""

    batch_size: Annotated[int, Field(ge=1)] = 64
    text: Paths | None = None

    # Settings of training.
    seed: ClassVar[int] = 0
    limit: ClassVar[None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.text_read: Sequence[str] | None = None

    def check_fields(self) -> None:
        if self.text is not None:
            self.found["text"] = None  # of files that are read later
        super().check_fields()

    def encode(self) -> None:
        self.long = 0
        self.held_out_prompts = self.examples_of(self._held_out, held_out=True)
        self.check_left("prompts", None, self.held_out_prompts)

    def sizes(self) -> dict[str, int]:
        return {"held_out_prompts": len(self.held_out_prompts)}

    def evaluated_prompts(self) -> Iterator[Messages]:
        """The prompts that no model may have been trained on."""
        yield from (prompt.messages for prompt in self.held_out_prompts)

    def for_module(self) -> dict[str, Any]:
        reading = {"special_tokens": self.special_tokens, "note": self.note}
        return {**super().for_module(), **reading, "documents": self.documents()}

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        if self.text is not None and self.text_read is None:
            self.text_read = self.load(self.text, parse_text)

    def documents(self) -> Sequence[str]:
        """The held-out text; empty where there is none."""
        return self.text_read or []

    def test_dataloader(self) -> BatchLoader[PromptBatch]:
        return self.sampled(self.held_out_prompts)


@dataclass(eq=False, repr=False, kw_only=True)
class WorldEvaluateDataModule(WithoutFiles, EvaluateDataModule, WorldFirst):
    """The held-out prompts of the built-in world, and ``text_documents`` documents newly drawn from its corpus."""

    text_documents: Annotated[int, Field(ge=0)] = 300

    text: ClassVar[None] = None
    max_length: ClassVar[int] = 512
    on_long: ClassVar[str] = "skip"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.judge = self.world

    def records(self) -> tuple[list[PromptRecord], list[PromptRecord]]:
        return [], held_out_records(self.world, self.split_seed)

    def documents(self) -> Sequence[str]:
        # Pretraining draws its documents with the split's seed.
        return self.world.corpus(self.text_documents, self.split_seed + 1, split_seed=self.split_seed)
