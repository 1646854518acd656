"""Reward model: a scalar head at the last token, Bradley-Terry over all pairs of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.functional import pair_accuracy, ranking_loss, ranking_pairs
from lit_rlhf.models import packed_scores, save_model
from lit_rlhf.stages.reward.baseline import bag_of_words_accuracy
from lit_rlhf.stages.reward.data import RankingBatch
from lit_rlhf.text.packing import pack
from lit_rlhf.training import OptimizerFactory, Schedule, adamw, decay_groups, warmup_decay
from lit_rlhf.training.optim import optimizer_and_schedule


class RewardModule(LightningModule):
    """Trains a reward model on rankings.

    K answers to a prompt take K forward passes, not K (K - 1): each is read once, and its score serves all its pairs.

    Args:
        reward_model: a sequence classifier with one label; its trunk usually comes from the SFT model.
        tokenizer: with the chat template; saved beside the model.
        optimizer: receives parameter groups.
        schedule: receives the optimizer and the number of steps.
        bag_of_words: also fit a logistic regression on word counts, to compare with.
    """

    def __init__(
        self,
        reward_model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        optimizer: OptimizerFactory = adamw,
        schedule: Schedule = warmup_decay,
        bag_of_words: bool = False,
    ) -> None:
        super().__init__()
        self.reward_model = reward_model.train()
        torch.nn.init.zeros_(self.reward_model.score.weight)
        self.tokenizer = tokenizer
        self.optimizer, self.schedule = optimizer, schedule
        self.bag_of_words = bag_of_words
        self._val: list[tuple[Tensor, RankingBatch]] = []

    def training_step(self, batch: RankingBatch, batch_idx: int) -> Tensor:
        scores = packed_scores(self.reward_model, batch.packed)
        pairs = ranking_pairs(batch.ranks, batch.prompt_index)
        loss = ranking_loss(scores, pairs) * batch.share
        self.log("reward/loss", loss, prog_bar=True)
        if pairs.prompts:
            self.log("reward/accuracy", pair_accuracy(scores, pairs))
            self.log("reward/margin", (scores[pairs.better] - scores[pairs.worse]).mean())
        self.log("reward/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def on_validation_epoch_start(self) -> None:
        self._val = []

    def validation_step(self, batch: RankingBatch, batch_idx: int) -> None:
        self._val.append((packed_scores(self.reward_model, batch.packed).float(), batch))

    def on_validation_epoch_end(self) -> None:
        """Loss and accuracy over all held-out pairs together, each pair once."""
        offset, index = 0, []
        for _, batch in self._val:
            index.append(batch.prompt_index + offset)
            offset += int(batch.prompt_index.max()) + 1
        scores, prompt_index = torch.cat([s for s, _ in self._val]), torch.cat(index)
        pairs = ranking_pairs(torch.cat([b.ranks for _, b in self._val]), prompt_index)
        metrics = {
            "val/reward/loss": ranking_loss(scores, pairs),
            "val/reward/accuracy": pair_accuracy(scores, pairs),
        }
        if self._val[0][1].gold is not None:
            gold = torch.cat([b.gold for _, b in self._val])
            metrics["val/reward/gold_accuracy"] = pair_accuracy(scores, ranking_pairs(-gold, prompt_index))
        self.log_dict(metrics, prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> dict[str, Any]:
        return optimizer_and_schedule(self, decay_groups(self.reward_model), self.optimizer, self.schedule)

    @torch.no_grad()
    def raw_scores(self, sequences: Sequence[Sequence[int]], batch_size: int = 256) -> Tensor:
        """Scores (N,) of token sequences, before the shift."""
        training = self.reward_model.training
        self.reward_model.eval()
        scores = [
            packed_scores(
                self.reward_model,
                self.transfer_batch_to_device(
                    pack(sequences[i : i + batch_size], self.tokenizer.pad_token_id), self.device, 0
                ),
            )
            for i in range(0, len(sequences), batch_size)
        ]
        self.reward_model.train(training)
        return torch.cat(scores).float()

    def calibrate(self) -> None:
        """Shift the scores so that demonstrations average 0 (InstructGPT, section 3.5), and note how far answers spread.

        Both go into config.json: ``score = logit + score_shift``, and PPO divides by ``score_std``."""
        data = self.trainer.datamodule
        self.reward_model.config.score_shift = -self.raw_scores(data.demonstration_sequences).mean().item()
        answers = [sequence for ranking in data.train_set[:512] for sequence in ranking.sequences]
        self.reward_model.config.score_std = max(self.raw_scores(answers).std().item(), 1e-6)

    def figures(self) -> dict[str, Any]:
        """Headline figures, from the last validation."""
        metrics = self.trainer.callback_metrics
        gold = metrics.get("val/reward/gold_accuracy")
        data = self.trainer.datamodule
        figures = {
            "val_loss": metrics["val/reward/loss"].item(),
            "val_accuracy": metrics["val/reward/accuracy"].item(),
            "gold_accuracy": None if gold is None else gold.item(),
            "val_pairs": sum(len(set(r.ranks)) > 1 for r in data.val_set),
        }
        if self.bag_of_words:
            figures["bag_of_words_accuracy"] = bag_of_words_accuracy(data.train_rankings, data.val_rankings)
        return figures

    def export(self, folder: Path) -> None:
        """Write ``model/``: a sequence classifier that transformers loads; its logit is the score before the shift."""
        self.calibrate()
        save_model(self.reward_model, self.tokenizer, folder / "model")
