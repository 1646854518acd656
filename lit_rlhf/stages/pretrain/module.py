"""Next-token pretraining (GPT-1, eq. 1)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from lightning import LightningDataModule
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.errors import say_once
from lit_rlhf.models import TextRows, check_rows, save_model, text_loss
from lit_rlhf.rollouts import Sampling
from lit_rlhf.stages.prompts import written
from lit_rlhf.text.special_tokens import encode_texts, text_start
from lit_rlhf.text.template import Note
from lit_rlhf.training import Meter, OptimizerFactory, Part, Schedule, StepLog, adamw, decay_groups, warmup_decay
from lit_rlhf.training.optim import optimizer_and_schedule


class PretrainModule(StepLog):
    """Trains a language model on rows of text.

    Args:
        policy: the model, freshly initialized or a checkpoint to go on from.
        tokenizer: the one that made the rows; saved beside the model.
        optimizer: receives parameter groups.
        schedule: receives the optimizer and the number of steps.
        max_grad_norm: gradients are clipped to this norm; None: they are not.
        sample_prompt: where the text samples during training begin; "" is end-of-text, the start of a document.
        sampling: how they are drawn.
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
        sample_prompt: str = "",
        sampling: Sampling = Sampling(max_new_tokens=64),
        note: Note = say_once,
    ) -> None:
        super().__init__()
        self.policy = policy.train()
        self.tokenizer = tokenizer
        self.optimizer, self.schedule, self.max_grad_norm = optimizer, schedule, max_grad_norm
        self.sample_prompt, self.sampling, self.note = sample_prompt, sampling, note
        self.register_buffer("tokens_seen", torch.zeros((), dtype=torch.int64))

    def on_train_batch_start(self, batch: TextRows | list[Part[TextRows]], batch_idx: int) -> None:
        self._check(batch[0].batch if isinstance(batch, list) else batch)

    def on_validation_batch_start(self, batch: TextRows, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._check(batch)

    def _check(self, rows: TextRows) -> None:
        check_rows(self.policy, rows.labels.shape[1], "pretrain.data.block_size")

    def training_step(self, batch: TextRows | list[Part[TextRows]], batch_idx: int) -> Tensor:
        loss, _ = self.in_parts(batch, batch_idx, lambda part: (text_loss(self.policy, part), {}))
        rows = [part.batch for part in batch] if isinstance(batch, list) else [batch]
        self.tokens_seen += sum(part.labels.numel() for part in rows) * self.trainer.world_size
        self.log("pretrain/loss", loss, prog_bar=True)
        self.log("pretrain/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def validation_step(self, batch: TextRows, batch_idx: int, dataloader_idx: int = 0) -> None:
        name = ("val/pretrain/loss", "val/pretrain/old_loss")[dataloader_idx]
        settings = {"batch_size": batch.labels.numel(), "prog_bar": True, "sync_dist": True}
        self.log(name, text_loss(self.policy, batch), add_dataloader_idx=False, **settings)

    def dry_run(self, meter: Meter, data: LightningDataModule) -> None:
        """One step of training and of validation, on models without values."""
        meter.fit(self, data, partial(text_loss, self.policy))

    def configure_optimizers(self) -> dict[str, Any]:
        return optimizer_and_schedule(self, decay_groups(self.policy), self.optimizer, self.schedule)

    def write_samples(self) -> list[tuple[str, str]]:
        """(start, continuation): two texts of the model as it is now."""
        [prompt] = encode_texts(self.tokenizer, [self.sample_prompt])
        start = [*text_start(self.tokenizer), *prompt] or [self.tokenizer.eos_token_id]
        return [(self.sample_prompt, text) for text in written(self, self.sampling, [start] * 2, self.note)]

    def figures(self) -> dict[str, Any]:
        """Headline figures, from the last validation."""
        metrics = self.trainer.callback_metrics
        old = {"old_loss": metrics["val/pretrain/old_loss"].item()} if "val/pretrain/old_loss" in metrics else {}
        return {"val_loss": metrics["val/pretrain/loss"].item(), **old, "tokens": int(self.tokens_seen)}

    def export(self, folder: Path) -> None:
        """Write ``model/``: a causal language model that transformers loads."""
        save_model(self.policy, self.tokenizer, folder / "model")
