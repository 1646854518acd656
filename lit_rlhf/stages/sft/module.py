"""Supervised fine-tuning: the language-modelling loss, on response tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.errors import say_once
from lit_rlhf.models.chunked import token_logprobs_of
from lit_rlhf.models.policy import packed_hidden
from lit_rlhf.rollouts import Sampling
from lit_rlhf.stages.prompts import SamplePrompt, sample_texts
from lit_rlhf.stages.sft.data import SFTBatch
from lit_rlhf.stages.supervised import MeanLoss, SupervisedModule, mean_loss
from lit_rlhf.text.template import Note
from lit_rlhf.training.optim import OptimizerFactory, Schedule, adamw, warmup_decay


class SFTModule(SupervisedModule):
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

    stage = "sft"

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
        super().__init__(tokenizer, optimizer, schedule, max_grad_norm)
        self.policy = policy.train()
        self.sampling, self.sample_prompts, self.note = sampling, sample_prompts, note

    def losses(self, batch: SFTBatch) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Mean loss in nats per response token, over the whole optimizer step's tokens; nothing besides."""
        hidden = packed_hidden(self.policy, batch.packed, at=batch.learned - 1)  # the token before predicts
        logprobs = token_logprobs_of(self.policy, hidden, batch.packed.tokens[batch.learned])
        return -logprobs.sum() / batch.normalizer, {}

    def examined(self, batch: SFTBatch, dataloader_idx: int) -> MeanLoss:
        return MeanLoss(self.losses(batch)[0], len(batch.learned))

    def held_out_metrics(self) -> dict[str, Tensor]:
        return {"loss": mean_loss(self.held_out)}

    def write_samples(self) -> list[tuple[str, str]]:
        """(prompt, response) of ``sample_prompts``, by the model as it is now."""
        return sample_texts(self, self.sampling, self.sample_prompts, self.note)

    def figures(self) -> dict[str, Any]:
        """Headline figures, from the last validation."""
        return {"val_loss": self.trainer.callback_metrics["val/sft/loss"].item()}
