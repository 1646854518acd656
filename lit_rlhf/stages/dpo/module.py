"""Direct preference optimization: the policy is fitted to rankings, as its own reward model (arXiv:2305.18290)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.errors import say_once
from lit_rlhf.functional import dpo_loss, implicit_rewards, pair_accuracy, ranking_pairs
from lit_rlhf.models.reference import Reference, ReferenceUpdate
from lit_rlhf.models.responses import response_logprobs
from lit_rlhf.rollouts import Sampling
from lit_rlhf.stages.prompts import SamplePrompt, sample_texts
from lit_rlhf.stages.rankings import RankingBatch, RankingModule
from lit_rlhf.text.template import Note
from lit_rlhf.training.optim import OptimizerFactory, Schedule, adamw, warmup_decay


class DPOModule(RankingModule):
    """Fits a policy to rankings, without a reward model and without sampling.

    As in the reward model, each of K answers is read once, and its log-prob serves all its pairs.

    Args:
        policy: what is trained; starts as the SFT model. The reference is what it starts as.
        tokenizer: of the policy, with its chat template; saved beside the model.
        optimizer: receives parameter groups.
        schedule: receives the optimizer and the number of steps.
        max_grad_norm: gradients are clipped to this norm; None: they are not.
        beta: reward units per nat: the larger, the nearer the policy stays to the reference.
        sampling: how the samples during training are drawn.
        sample_prompts: what the policy answers during training, for people to read.
        note: says what a person should know, each line once.
    """

    stage = "dpo"
    frozen_models = ("reference.",)

    def __init__(
        self,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        optimizer: OptimizerFactory = partial(adamw, lr=1e-5),
        schedule: Schedule = warmup_decay,
        max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0,
        beta: Annotated[float, Field(gt=0)] = 0.1,
        sampling: Sampling = Sampling(),
        sample_prompts: Sequence[SamplePrompt] = (),
        note: Note = say_once,
    ) -> None:
        super().__init__(tokenizer, optimizer, schedule, max_grad_norm)
        self.policy, self.reference = policy, Reference(policy, ReferenceUpdate())
        self.beta, self.sampling, self.sample_prompts, self.note = beta, sampling, sample_prompts, note
        self.eval()  # see train(): models made from a config come in training mode

    def logprobs(self, batch: RankingBatch) -> tuple[Tensor, Tensor]:
        """Log-probs (N,) of whole answers in nats, end-of-text included, under the policy and under the reference."""
        with torch.no_grad(), self.reference.as_it_began(self.policy) as reference:
            name = "the log-probs of the reference"
            ref_logprobs = response_logprobs(reference, batch.packed, name=name).sum(-1)
        return response_logprobs(self.policy, batch.packed).sum(-1), ref_logprobs

    def losses(self, batch: RankingBatch) -> tuple[Tensor, dict[str, Tensor | None]]:
        """(loss of a batch, what is to be watched)."""
        logprobs, ref_logprobs = self.logprobs(batch)
        pairs = ranking_pairs(batch.ranks, batch.prompt_index)
        names = ("accuracy", "margin", "chosen_log_ratio", "rejected_log_ratio")
        found: tuple[Tensor | None, ...] = (None,) * len(names)
        if pairs.prompts:
            log_ratios = (logprobs - ref_logprobs).detach()
            chosen, rejected = log_ratios[pairs.better].mean(), log_ratios[pairs.worse].mean()
            of_pairs = (pair_accuracy(log_ratios, pairs), self.beta * (chosen - rejected), chosen, rejected)
            found = tuple(value * batch.pair_share for value in of_pairs)
        watched = {f"dpo/{name}": value for name, value in zip(names, found)}
        return dpo_loss(logprobs, ref_logprobs, pairs, self.beta) * batch.share, watched

    def worth(self, batch: RankingBatch) -> Tensor:
        return implicit_rewards(*self.logprobs(batch), self.beta)

    def write_samples(self) -> list[tuple[str, str]]:
        """(prompt, response) of ``sample_prompts``, by the policy as it is now."""
        return sample_texts(self, self.sampling, self.sample_prompts, self.note)

    def train(self, mode: bool = True) -> DPOModule:
        """Dropout stays off in both models, or the first step's log-ratios would not be 0."""
        return super().train(False)
