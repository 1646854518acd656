"""Held-out prompts to be graded on."""

from __future__ import annotations

from lit_rlhf.stages.prompts import PromptBatch, PromptDataModule, WorldPromptDataModule
from lit_rlhf.training import BatchLoader


class EvaluateDataModule(PromptDataModule):
    """The held-out prompts of a file; arguments as in :class:`PromptDataModule`."""

    def test_dataloader(self) -> BatchLoader[PromptBatch]:
        return self.loader(self.held_out_prompts)


class WorldEvaluateDataModule(WorldPromptDataModule, EvaluateDataModule):
    """The held-out prompts of the built-in world."""
