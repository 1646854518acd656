"""Discriminative fine-tuning (GPT-1): a linear head at the last token, and the language-modelling loss beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_confusion_matrix, multiclass_f1_score
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.errors import UserError
from lit_rlhf.functional import added, classification_loss, side_by_side, wilson_interval
from lit_rlhf.models.checkpoint import save_model
from lit_rlhf.models.chunked import token_logprobs_of
from lit_rlhf.models.heads import sequence_classifier
from lit_rlhf.models.loading import intended_dtype
from lit_rlhf.models.lora import save_adapter
from lit_rlhf.models.policy import packed_hidden
from lit_rlhf.models.reward_head import RewardHead
from lit_rlhf.stages.classify.data import ClassifyBatch
from lit_rlhf.stages.supervised import MeanLoss, SupervisedModule, mean_loss
from lit_rlhf.training.optim import OptimizerFactory, Schedule, adamw, decay_groups, warmup_decay


class Predictions(NamedTuple):
    """Predictions for B held-out examples."""

    logits: Tensor  # (B, C) of the labels, or of the choices
    labels: Tensor  # (B,) int64
    inputs: Tensor  # (B,) int64, how many each example has
    lm_loss: MeanLoss


class ClassifyModule(SupervisedModule):
    """Fine-tunes a language model to tell labels, with L3 = L2 + lambda L1 (GPT-1, eq. 5).

    The head reads the hidden state at the extract token. Of a pair of similar texts both orders are read and the two
    states added; of a question with choices each choice is read, and the head's one output a choice goes through a
    softmax over the choices.

    Args:
        policy: the pretrained model.
        tokenizer: of the data module, with the start, delimiter and extract tokens; saved beside the model.
        labels: their names, in the order of their numbers; []: the examples are questions with choices.
        optimizer: receives parameter groups.
        schedule: receives the optimizer and the number of steps.
        max_grad_norm: gradients are clipped to this norm; None: they are not.
        head_lr: learning rate of the head, which starts fresh on a backbone that knows much; None: the backbone's.
        lm_coef: lambda, weight of the language-modelling loss on the inputs (nats per token); 0: none.
        task: what the figures call it.
    """

    stage = "classify"

    def __init__(
        self,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        labels: Sequence[str],
        optimizer: OptimizerFactory = adamw,
        schedule: Schedule = warmup_decay,
        max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0,
        head_lr: Annotated[float, Field(ge=0)] | None = 1e-3,
        lm_coef: Annotated[float, Field(ge=0)] = 0.5,
        task: str = "classification",
    ) -> None:
        super().__init__(tokenizer, optimizer, schedule, max_grad_norm)
        if not RewardHead().is_classifier(policy.config):
            raise UserError(
                f"transformers has no sequence classifier of {type(policy).__name__}, and classification ends in one; "
                "take a model of another family"
            )
        self.policy = policy.train()
        self.head_lr, self.lm_coef, self.labels, self.task = head_lr, lm_coef, list(labels), task
        self.head: nn.Linear | None = None

    def configure_model(self) -> None:
        """Make the head."""
        if self.head is None:
            width = self.policy.get_input_embeddings().weight.shape[1]
            like = {"device": self.policy.device, "dtype": intended_dtype(self.policy)}
            self.head = nn.Linear(width, len(self.labels) or 1, bias=False, **like)
            nn.init.normal_(self.head.weight, std=0.02)
        super().configure_model()

    def hidden(self, batch: ClassifyBatch) -> tuple[Tensor, Tensor]:
        """Last hidden states of the inputs' last tokens (N, D), and of those before the learned ones (M, D)."""
        at = torch.cat([batch.packed.ends, batch.learned - 1])  # the token before predicts
        return packed_hidden(self.policy, batch.packed, at=at).split([len(batch.packed.ends), len(batch.learned)])

    def logits(self, last: Tensor, batch: ClassifyBatch) -> Tensor:
        """(B, C) of the labels, or of the choices, from the hidden states (N, D) of the last tokens."""
        if self.head.out_features == 1:
            return side_by_side(self.head(last).squeeze(-1), batch.example)
        return self.head(added(last, batch.example))

    def lm_loss(self, before: Tensor, batch: ClassifyBatch) -> Tensor:
        """L1: mean loss in nats per token, over the whole optimizer step's tokens, negated log-likelihood."""
        return -token_logprobs_of(self.policy, before, batch.packed.tokens[batch.learned]).sum() / batch.normalizer

    def losses(self, batch: ClassifyBatch) -> tuple[Tensor, dict[str, Tensor | None]]:
        """(loss of a batch, what is to be watched)."""
        last, before = self.hidden(batch)
        logits = self.logits(last, batch)
        loss = classification_loss(logits, batch.labels)
        right = (logits.argmax(-1) == batch.labels).float().mean()
        watched: dict[str, Tensor | None] = {"classify/loss": loss, "classify/accuracy": right}
        if self.lm_coef > 0:
            watched["classify/lm_loss"] = self.lm_loss(before, batch)
            loss = loss + self.lm_coef * watched["classify/lm_loss"]
        return loss, watched

    def examined(self, batch: ClassifyBatch, dataloader_idx: int) -> Predictions:
        last, before = self.hidden(batch)
        lm_loss = MeanLoss(self.lm_loss(before, batch), len(batch.learned))
        return Predictions(self.logits(last, batch).float(), batch.labels, batch.example.bincount(), lm_loss)

    def held_out_metrics(self) -> dict[str, Tensor]:
        """Over all held-out examples together."""
        losses = [classification_loss(found.logits, found.labels) * len(found.labels) for found in self.held_out]
        labels, told = self._told()
        metrics = {
            "lm_loss": mean_loss(found.lm_loss for found in self.held_out),
            "loss": torch.stack(losses).sum() / len(labels),
            "accuracy": (labels == told).float().mean(),
        }
        if self.labels:
            metrics["f1"] = multiclass_f1_score(told, labels, num_classes=len(self.labels), average="macro")
        return metrics

    def _told(self) -> tuple[Tensor, Tensor]:
        """(labels, what the model says), both (held-out examples,)."""
        found = self.held_out
        return torch.cat([each.labels for each in found]), torch.cat([each.logits.argmax(-1) for each in found])

    def parameter_groups(self) -> list[dict[str, Any]]:
        return decay_groups(self, self.head.parameters(), self.head_lr)

    def figures(self) -> dict[str, Any]:
        """Headline figures, from the last validation; ``guessing``: who always says the most frequent label."""
        metrics = self.trainer.callback_metrics
        labels, told = self._told()
        low, high = wilson_interval(int((labels == told).sum()), len(labels))
        figures: dict[str, Any] = {
            "task": self.task,
            "val_loss": metrics["val/classify/loss"].item(),
            "accuracy": metrics["val/classify/accuracy"].item(),
            "accuracy_low": low,
            "accuracy_high": high,
            "examples": len(labels),
        }
        if not self.labels:
            choices = torch.cat([found.inputs for found in self.held_out])
            return {**figures, "guessing": (1 / choices.double()).mean().item()}
        confusion = multiclass_confusion_matrix(told, labels, num_classes=len(self.labels))
        return {
            **figures,
            "guessing": confusion.sum(1).max().item() / len(labels),
            "f1": metrics["val/classify/f1"].item(),
            "labels": self.labels,
            "confusion": confusion.tolist(),
        }

    def export(self, folder: Path) -> None:
        """Write ``model/``: a sequence classifier that transformers loads, with a tokenizer that puts the three tokens.

        Of similar texts the logits of both orders are to be added: the head has no bias, so that is the same as adding
        the states. Of choices it scores one input."""
        save_model(
            sequence_classifier(self.policy, self.head, self.labels or ["score"]), self.tokenizer, folder / "model"
        )
        save_adapter(self, self.tokenizer, folder / "adapter")
