"""Next-token pretraining (GPT-1, eq. 1)."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.errors import say_once
from lit_rlhf.models.text_rows import TextRows, check_rows, text_loss
from lit_rlhf.rollouts import Sampling
from lit_rlhf.stages.prompts import written
from lit_rlhf.stages.supervised import MeanLoss, SupervisedModule, mean_loss
from lit_rlhf.text.special_tokens import encode_texts, text_start
from lit_rlhf.text.template import Note
from lit_rlhf.training.optim import OptimizerFactory, Schedule, adamw, warmup_decay
from lit_rlhf.training.parts import Part


class PretrainModule(SupervisedModule):
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

    stage = "pretrain"

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
        super().__init__(tokenizer, optimizer, schedule, max_grad_norm)
        self.policy = policy.train()
        self.sample_prompt, self.sampling, self.note = sample_prompt, sampling, note
        self.register_buffer("tokens_seen", torch.zeros((), dtype=torch.int64))

    def losses(self, batch: TextRows) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Mean loss in nats per token; nothing besides."""
        check_rows(self.policy, batch.labels.shape[1], "pretrain.data.block_size")
        return text_loss(self.policy, batch), {}

    def training_step(self, batch: TextRows | list[Part[TextRows]], batch_idx: int) -> Tensor:
        rows = [part.batch for part in batch] if isinstance(batch, list) else [batch]
        self.tokens_seen += sum(part.labels.numel() for part in rows) * self.trainer.world_size
        return super().training_step(batch, batch_idx)

    def examined(self, batch: TextRows, dataloader_idx: int) -> tuple[str, MeanLoss]:
        """Name of the text's loss, and the loss."""
        name = ("loss", "old_loss")[dataloader_idx]
        return name, MeanLoss(self.losses(batch)[0], batch.labels.numel())

    def held_out_metrics(self) -> dict[str, Tensor]:
        names = dict.fromkeys(name for name, _ in self.held_out)
        return {name: mean_loss(loss for of, loss in self.held_out if of == name) for name in names}

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
