"""Prompts whose answers are to be ranked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field
from torch.utils.data import ConcatDataset

from lit_rlhf.stages.prompts import PromptBatch, PromptDataModule, WorldPromptDataModule
from lit_rlhf.training.batches import BatchLoader


@dataclass(eq=False, repr=False, kw_only=True)
class PreferenceDataModule(PromptDataModule):
    """Every prompt of a file once, the held-out ones too: they test the reward model."""

    batch_size: Annotated[int, Field(ge=1)] = 64

    reads = ("kind", "responses", "models", "temperatures", "finished")  # answers that are given, not drawn

    def for_module(self) -> dict[str, Any]:
        return {**super().for_module(), "special_tokens": self.special_tokens, "note": self.note}

    def predict_dataloader(self) -> BatchLoader[PromptBatch]:
        return self.sampled(ConcatDataset([self.train_prompts, self.held_out_prompts]))


@dataclass(eq=False, repr=False, kw_only=True)
class WorldPreferenceDataModule(WorldPromptDataModule, PreferenceDataModule):
    """Prompts of the built-in world."""

    prompts: Annotated[int, Field(ge=1)] = 2000
    batch_size: Annotated[int, Field(ge=1)] = 64
