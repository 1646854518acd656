"""Prompts for PPO."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import Field

from lit_rlhf.stages.answer_scores import OWN
from lit_rlhf.stages.prompts import PromptBatch, PromptDataModule, SamplePrompt, WorldPromptDataModule, spread
from lit_rlhf.text.chat import ensure_chat_template
from lit_rlhf.text.records import Messages, Seen
from lit_rlhf.training.batches import BatchLoader


@dataclass(eq=False, repr=False, kw_only=True)
class PPODataModule(PromptDataModule):
    """Prompts of a file, as many batches as the trainer takes (``trainer.limit_train_batches``, PPO's iterations).

    Args:
        weights: share of each entry of ``path`` in what is trained on, of any sum; where ``path`` is no list, of each
            of its files. None: in proportion to their sizes.

    The others are those of :class:`PromptDataModule`."""

    weights: list[Annotated[float, Field(gt=0)]] | None = None

    def note_seen(self, file: str, seen: Seen) -> None:
        renamed = (self.fields or {}).values()
        if names := [name for name in seen.unread if name in OWN and name not in renamed]:
            said = f"nobody reads the field{'s' if len(names) > 1 else ''} {', '.join(names)}, for reward functions get"
            instead = f"give another name where they are wanted, ppo.data.fields='{{NAME: {names[0]}}}'"
            self.note(f"{file}: {said} the policy's own; {instead}")
        super().note_seen(file, replace(seen, unread=dict.fromkeys(n for n in seen.unread if n not in names)))

    def unread(self, names: str) -> str:
        return f"only reward functions read the field{'s' if ', ' in names else ''} {names}"

    def setup(self, stage: str | None = None) -> None:
        if self.tokenizer.chat_template is None:
            ensure_chat_template(self.tokenizer)  # the one that a reward model of this tokenizer reads, too
            self.note("the checkpoint has no chat template; it gets that of a transcript, which is saved with it")
        super().setup(stage)

    def for_module(self) -> dict[str, Any]:
        asked = [SamplePrompt(prompt.messages, prompt.tokens) for prompt in spread(self.held_out_prompts, 4)]
        return {**super().for_module(), "sample_prompts": asked}

    def train_dataloader(self) -> BatchLoader[PromptBatch]:
        iterations = self.trainer.limit_train_batches if self.trainer is not None else 1.0
        batch = self.batch_size * (self.trainer.world_size if self.trainer is not None else 1)
        length = iterations * batch if isinstance(iterations, int) else max(len(self.train_prompts), batch)
        if batch > len(self.train_prompts):
            prompts = f"the {len(self.train_prompts)} prompts to train on"
            self.note(f"batch_size={self.batch_size} is more than {prompts}: a rollout answers them several times")
        return self.loader(self.train_prompts, shuffle_to=length)

    def trained_prompts(self) -> Iterator[Messages]:
        """The prompts that are answered in training."""
        yield from (prompt.messages for prompt in self.train_prompts)

    def val_dataloader(self) -> BatchLoader[PromptBatch]:
        return self.loader(self.held_out_prompts)


class WorldPPODataModule(WorldPromptDataModule, PPODataModule):
    """Prompts of the built-in world."""
