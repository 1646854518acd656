"""Held-out prompts to be graded on, and held-out text to be read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import Field
from transformers import PreTrainedTokenizerBase

from lit_rlhf.stages.prompts import PromptBatch, PromptDataModule, WorldPromptDataModule
from lit_rlhf.stages.records import Paths
from lit_rlhf.text.records import Messages, OnBadRecord, parse_text
from lit_rlhf.text.special_tokens import SpecialTokens
from lit_rlhf.text.world import World
from lit_rlhf.training import BatchLoader


class EvaluateDataModule(PromptDataModule):
    """The held-out prompts of a file; the others are not needed, so that ``limit`` keeps one.

    Args:
        text: files of text that no model was trained on (.txt, or records with a field ``text``), for the perplexity;
            None: it is not measured.

    The others are those of :class:`PromptDataModule`."""

    def __init__(
        self,
        path: Paths,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: Annotated[int, Field(ge=1)] = 64,
        max_length: Annotated[int, Field(ge=1)] = 512,
        on_long: Literal["skip", "cut"] = "skip",
        held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1,
        limit_held_out: Annotated[int, Field(ge=1)] | None = None,
        split_seed: int = 0,
        special_tokens: SpecialTokens = "plain",
        seed: int = 0,
        limit: Annotated[int, Field(ge=1)] | None = 1,
        on_bad_record: OnBadRecord = "fail",
        fields: dict[str, str] | None = None,
        text: Paths | None = None,
    ) -> None:
        super().__init__(
            path, tokenizer, batch_size=batch_size, max_length=max_length, on_long=on_long, held_out=held_out,
            limit_held_out=limit_held_out, split_seed=split_seed, special_tokens=special_tokens, seed=seed,
            limit=limit, on_bad_record=on_bad_record, fields=fields,
        )  # fmt: skip
        self.text = text

    def evaluated_prompts(self) -> Iterator[Messages]:
        """The prompts that no model may have been trained on."""
        yield from (prompt.messages for prompt in self.held_out_prompts)

    def documents(self) -> Sequence[str]:
        """The held-out text; empty where there is none."""
        return [] if self.text is None else self.load(self.text, parse_text)

    def test_dataloader(self) -> BatchLoader[PromptBatch]:
        return self.loader(self.held_out_prompts)


class WorldEvaluateDataModule(WorldPromptDataModule, EvaluateDataModule):
    """The held-out prompts of the built-in world, and ``text_documents`` documents newly drawn from its corpus."""

    def __init__(
        self,
        world: World,
        tokenizer: PreTrainedTokenizerBase,
        *,
        prompts: Annotated[int, Field(ge=1)] = 1,
        batch_size: Annotated[int, Field(ge=1)] = 64,
        limit_held_out: Annotated[int, Field(ge=1)] | None = None,
        split_seed: int = 0,
        seed: int = 0,
        limit: Annotated[int, Field(ge=1)] | None = 1,
        text_documents: Annotated[int, Field(ge=0)] = 300,
    ) -> None:
        super().__init__(
            world, tokenizer, prompts=prompts, batch_size=batch_size, limit_held_out=limit_held_out,
            split_seed=split_seed, seed=seed, limit=limit,
        )  # fmt: skip
        self.text_documents = text_documents

    def documents(self) -> Sequence[str]:
        # Pretraining draws its documents with the split's seed.
        return self.world.corpus(self.text_documents, self.split_seed + 1, split_seed=self.split_seed)
