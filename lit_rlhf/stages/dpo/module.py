"""Direct preference optimization: the policy is fitted to rankings, as its own reward model (arXiv:2305.18290)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from lightning import LightningDataModule
from lightning.pytorch.callbacks import Callback
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.errors import say_once
from lit_rlhf.functional import dpo_loss, implicit_rewards, pair_accuracy, ranking_pairs
from lit_rlhf.models import Reference, ReferenceUpdate, response_logprobs, save_adapter, save_model
from lit_rlhf.rollouts import Sampling
from lit_rlhf.stages.prompts import SamplePrompt, sample_texts
from lit_rlhf.stages.rankings import RankingBatch, ranked
from lit_rlhf.stages.records import FitContext
from lit_rlhf.text.template import Note
from lit_rlhf.training import Meter, OptimizerFactory, Part, Schedule, StepLog, adamw, decay_groups, warmup_decay
from lit_rlhf.training.optim import optimizer_and_schedule


class DPOModule(StepLog):
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

    frozen_models = ("reference.",)

    def __init__(
        self,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        optimizer: OptimizerFactory = partial(adamw, lr=3e-6),
        schedule: Schedule = warmup_decay,
        max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0,
        beta: Annotated[float, Field(gt=0)] = 0.1,
        sampling: Sampling = Sampling(),
        sample_prompts: Sequence[SamplePrompt] = (),
        note: Note = say_once,
    ) -> None:
        super().__init__()
        self.policy, self.reference = policy, Reference(policy, ReferenceUpdate())
        self.tokenizer = tokenizer
        self.optimizer, self.schedule, self.max_grad_norm = optimizer, schedule, max_grad_norm
        self.beta, self.sampling, self.sample_prompts, self.note = beta, sampling, sample_prompts, note
        self._val: list[tuple[Tensor, RankingBatch]] = []
        self._val_pairs = 0  # of the last validation
        self.eval()  # see train(): models made from a config come in training mode

    def configure_callbacks(self) -> list[Callback]:
        return [FitContext()]

    def logprobs(self, batch: RankingBatch) -> tuple[Tensor, Tensor]:
        """Log-probs (N,) of whole answers in nats, end-of-text included, under the policy and under the reference."""
        with torch.no_grad(), self.reference.as_it_began(self.policy) as reference:
            ref_logprobs = response_logprobs(reference, batch.packed).sum(-1)
        return response_logprobs(self.policy, batch.packed).sum(-1), ref_logprobs

    def losses(self, batch: RankingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss of a batch, what is to be watched)."""
        logprobs, ref_logprobs = self.logprobs(batch)
        pairs = ranking_pairs(batch.ranks, batch.prompt_index)
        watched = {}
        if pairs.prompts:
            log_ratios = (logprobs - ref_logprobs).detach()
            chosen, rejected = log_ratios[pairs.better].mean(), log_ratios[pairs.worse].mean()
            watched = {
                "dpo/accuracy": pair_accuracy(log_ratios, pairs),
                "dpo/margin": self.beta * (chosen - rejected),
                "dpo/chosen_log_ratio": chosen,
                "dpo/rejected_log_ratio": rejected,
            }
        return dpo_loss(logprobs, ref_logprobs, pairs, self.beta) * batch.share, watched

    def training_step(self, batch: RankingBatch | list[Part[RankingBatch]], batch_idx: int) -> Tensor:
        loss, watched = self.in_parts(batch, batch_idx, self.losses)
        self.log("dpo/loss", loss, prog_bar=True)
        for name, value in watched.items():
            self.log(name, value, prog_bar=name == "dpo/accuracy")
        self.log("dpo/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def on_validation_epoch_start(self) -> None:
        self._val = []

    def validation_step(self, batch: RankingBatch, batch_idx: int) -> None:
        self._val.append((implicit_rewards(*self.logprobs(batch), self.beta), batch))

    def on_validation_epoch_end(self) -> None:
        """Over all held-out pairs together, each pair once."""
        loss, accuracy, gold_accuracy, self._val_pairs = ranked(self._val)
        metrics = {"val/dpo/loss": loss, "val/dpo/accuracy": accuracy}
        if gold_accuracy is not None:
            metrics["val/dpo/gold_accuracy"] = gold_accuracy
        self.log_dict(metrics, prog_bar=True, sync_dist=True)

    def dry_run(self, meter: Meter, data: LightningDataModule) -> None:
        """One step of training and of validation, on models without values."""
        meter.fit(self, data, lambda batch: self.losses(batch)[0])

    def configure_optimizers(self) -> dict[str, Any]:
        return optimizer_and_schedule(self, decay_groups(self.policy), self.optimizer, self.schedule)

    def write_samples(self) -> list[tuple[str, str]]:
        """(prompt, response) of ``sample_prompts``, by the policy as it is now."""
        return sample_texts(self, self.sampling, self.sample_prompts, self.note)

    def figures(self) -> dict[str, Any]:
        """Headline figures, from the last validation; accuracies are those of the implicit rewards."""
        metrics = self.trainer.callback_metrics
        gold = metrics.get("val/dpo/gold_accuracy")
        return {
            "val_loss": metrics["val/dpo/loss"].item(),
            "val_accuracy": metrics["val/dpo/accuracy"].item(),
            "gold_accuracy": None if gold is None else gold.item(),
            "val_pairs": self._val_pairs,
        }

    def export(self, folder: Path) -> None:
        """Write ``model/``, a causal language model like the SFT model it began as; with LoRA also ``adapter/``."""
        save_model(self.policy, self.tokenizer, folder / "model")
        save_adapter(self.policy, self.tokenizer, folder / "adapter")

    def train(self, mode: bool = True) -> DPOModule:
        """Dropout stays off in both models, or the first step's log-ratios would not be 0."""
        return super().train(False)
