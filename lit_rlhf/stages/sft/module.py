"""Supervised fine-tuning: the language-modelling loss, on response tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from lightning import LightningDataModule
from lightning.pytorch.callbacks import Callback
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.errors import say_once
from lit_rlhf.models import packed_hidden, save_adapter, save_model, token_logprobs_of
from lit_rlhf.rollouts import Sampling
from lit_rlhf.stages.prompts import SamplePrompt, sample_texts
from lit_rlhf.stages.records import FitContext
from lit_rlhf.stages.sft.data import SFTBatch
from lit_rlhf.text.template import Note
from lit_rlhf.training import Meter, OptimizerFactory, Part, Schedule, StepLog, adamw, decay_groups, warmup_decay
from lit_rlhf.training.optim import optimizer_and_schedule


class SFTModule(StepLog):
    """Fine-tunes a language model on demonstrations.

    Args:
        policy: the pretrained model.
        tokenizer: with its chat template; saved beside the model.
        optimizer: receives parameter groups.
        schedule: receives the optimizer and the number of steps.
        max_grad_norm: gradients are clipped to this norm; None: they are not.
        sampling: how the samples during training are drawn.
        sample_prompts: what the model answers during training, for people to read.
        note: says what a person should know, each line once.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        optimizer: OptimizerFactory = adamw,
        schedule: Schedule = warmup_decay,
        max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0,
        sampling: Sampling = Sampling(),
        sample_prompts: Sequence[SamplePrompt] = (),
        note: Note = say_once,
    ) -> None:
        super().__init__()
        self.policy = policy.train()
        self.tokenizer = tokenizer
        self.optimizer, self.schedule, self.max_grad_norm = optimizer, schedule, max_grad_norm
        self.sampling, self.sample_prompts, self.note = sampling, sample_prompts, note

    def configure_callbacks(self) -> list[Callback]:
        return [FitContext()]

    def loss(self, batch: SFTBatch) -> Tensor:
        """Mean loss in nats per response token, over the whole optimizer step's tokens."""
        hidden = packed_hidden(self.policy, batch.packed, at=batch.learned - 1)  # the token before predicts
        logprobs = token_logprobs_of(self.policy, hidden, batch.packed.tokens[batch.learned])
        return -logprobs.sum() / batch.normalizer

    def training_step(self, batch: SFTBatch | list[Part[SFTBatch]], batch_idx: int) -> Tensor:
        loss, _ = self.in_parts(batch, batch_idx, lambda part: (self.loss(part), {}))
        self.log("sft/loss", loss, prog_bar=True)
        self.log("sft/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def validation_step(self, batch: SFTBatch, batch_idx: int) -> None:
        self.log("val/sft/loss", self.loss(batch), batch_size=len(batch.learned), prog_bar=True, sync_dist=True)

    def dry_run(self, meter: Meter, data: LightningDataModule) -> None:
        """One step of training and of validation, on models without values."""
        meter.fit(self, data, self.loss)

    def configure_optimizers(self) -> dict[str, Any]:
        return optimizer_and_schedule(self, decay_groups(self.policy), self.optimizer, self.schedule)

    def write_samples(self) -> list[tuple[str, str]]:
        """(prompt, response) of ``sample_prompts``, by the model as it is now."""
        return sample_texts(self, self.sampling, self.sample_prompts, self.note)

    def figures(self) -> dict[str, Any]:
        """Headline figures, from the last validation."""
        return {"val_loss": self.trainer.callback_metrics["val/sft/loss"].item()}

    def export(self, folder: Path) -> None:
        """Write ``model/``, a causal language model with its chat template; with LoRA also ``adapter/``."""
        save_model(self.policy, self.tokenizer, folder / "model")
        save_adapter(self.policy, self.tokenizer, folder / "adapter")
