"""Reward model: a score for an answer, learned by Bradley-Terry over all pairs of a prompt, and from single ratings."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.errors import UserError
from lit_rlhf.functional import feedback_loss, pair_accuracy, ranking_loss, ranking_pairs
from lit_rlhf.models.chunked import token_logprobs_of
from lit_rlhf.models.finite import finite
from lit_rlhf.models.heads import (
    head_parameters,
    kept_language_model,
    packed_scores,
    score_sequences,
    scores_and_hidden,
)
from lit_rlhf.models.logits import check_logits
from lit_rlhf.models.reward_head import RewardTransformer
from lit_rlhf.stages.rankings import RankedAnswers, RankingBatch, RankingModule
from lit_rlhf.stages.reward.data import CalibrationSet, PromptAndAnswer
from lit_rlhf.stages.reward.diagnosis import diagnosis
from lit_rlhf.text.records import Ranking
from lit_rlhf.training.callbacks import inner_bar
from lit_rlhf.training.fsdp import FSDP2
from lit_rlhf.training.optim import OptimizerFactory, Schedule, adamw, decay_groups, warmup_decay


class RewardModule(RankingModule):
    """Trains a reward model on rankings.

    K answers to a prompt take K forward passes, not K (K - 1): each is read once, and its score serves all its pairs.

    Args:
        reward_model: a sequence classifier with one label, or one with another head; its backbone usually comes from
            the SFT model.
        tokenizer: with the chat template; saved beside the model.
        optimizer: receives parameter groups.
        schedule: receives the optimizer and the number of steps.
        max_grad_norm: gradients are clipped to this norm; None: they are not.
        head_lr: learning rate of the head, which starts fresh on a backbone that knows much; None: the backbone's.
        lm_coef: weight of an auxiliary language-modelling loss on the best-ranked answers (nats per token), which keeps
            what the model knows while the head learns what people like; 0: none. A model whose output embedding is not
            its input embedding, or whose family puts more between states and logits, goes without.
        margin: what the scores of two answers must differ by, for each rank between them.
        label_smoothing: how often the annotator is thought to have erred.
        feedback_coef: weight of the loss on answers that were rated alone.
        feedback_loss: "logistic" for thumbs, "squared" for ratings that the score is to repeat, from -1 to 1.
        bag_of_words: also fit a logistic regression on word counts of ``rankings``, to compare with.
        calibration: what the scores are shifted and scaled by before the model is exported.
        rankings: (train, held out), for ``bag_of_words``.
    """

    stage = "reward"

    def __init__(
        self,
        reward_model: PreTrainedModel | RewardTransformer,
        tokenizer: PreTrainedTokenizerBase,
        *,
        optimizer: OptimizerFactory = adamw,
        schedule: Schedule = warmup_decay,
        max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0,
        head_lr: Annotated[float, Field(ge=0)] | None = 1e-3,
        lm_coef: Annotated[float, Field(ge=0)] = 0.0,
        margin: Annotated[float, Field(ge=0)] = 0.0,
        label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0,
        feedback_coef: Annotated[float, Field(ge=0)] = 1.0,
        feedback_loss: Literal["logistic", "squared"] = "logistic",
        bag_of_words: bool = False,
        calibration: CalibrationSet | None = None,
        rankings: tuple[Sequence[Ranking], Sequence[Ranking]] | None = None,
    ) -> None:
        super().__init__(tokenizer, optimizer, schedule, max_grad_norm)
        self.reward_model = reward_model.train()
        self.head_lr, self.lm_coef, self.bag_of_words = head_lr, lm_coef, bag_of_words
        self.margin, self.label_smoothing = margin, label_smoothing
        self.feedback_coef, self.feedback_loss = feedback_coef, feedback_loss
        self.calibration, self.rankings = calibration, rankings
        if bag_of_words and rankings is None:
            raise UserError("RewardModule: bag_of_words=True compares on rankings=(train, held out), and got none")
        if lm_coef > 0:
            try:
                check_logits(kept_language_model(reward_model))
            except UserError as error:
                rank_zero_warn(f"no language-modelling loss (lm_coef): {error}")
                self.lm_coef = 0.0
        self._diagnosis: dict[str, Any] = {}

    @property
    def trained(self) -> PreTrainedModel | RewardTransformer:
        return self.reward_model

    def losses(self, batch: RankingBatch) -> tuple[Tensor, dict[str, Tensor | None]]:
        """(loss of a batch, what is to be watched)."""
        imitated = batch.predicting if self.lm_coef > 0 else batch.predicting[:0]
        scores, hidden = scores_and_hidden(self.reward_model, batch.packed, imitated)
        pairs = ranking_pairs(batch.ranks, batch.prompt_index)
        margins = None if batch.margins is None else batch.margins[pairs.better] - batch.margins[pairs.worse]
        finite(scores, "the scores")
        loss = ranking_loss(scores, pairs, self.margin, self.label_smoothing, margins) * batch.share
        watched: dict[str, Tensor | None] = {"reward/loss": loss.detach()}
        watched |= dict.fromkeys(("reward/feedback_loss", "reward/lm_loss", "reward/accuracy", "reward/margin"))
        if batch.rated_share > 0:
            rated = feedback_loss(scores, batch.ratings, self.feedback_loss) * batch.rated_share
            watched["reward/feedback_loss"] = rated.detach()
            loss = loss + self.feedback_coef * rated
        if len(imitated):
            tokens = batch.packed.tokens[batch.learned]
            lm = -token_logprobs_of(kept_language_model(self.reward_model), hidden, tokens).mean()
            lm = lm * batch.learned_share
            watched["reward/lm_loss"] = lm.detach()
            loss = loss + self.lm_coef * lm
        if pairs.prompts:
            gap = (scores[pairs.better] - scores[pairs.worse]).mean().detach()
            watched["reward/accuracy"] = pair_accuracy(scores, pairs) * batch.pair_share
            watched["reward/margin"] = gap * batch.pair_share
        return loss, watched

    def worth(self, batch: RankingBatch) -> Tensor:
        return packed_scores(self.reward_model, batch.packed).float()

    def metrics_of(self, held_out: RankedAnswers) -> dict[str, Tensor]:
        """The loss is the plain one, without margin or smoothing; where there is feedback alone, the loss of that: of
        no pair it would be 0."""
        metrics = super().metrics_of(held_out)
        if not held_out.ratings.isnan().all():
            metrics["feedback_loss"] = feedback_loss(held_out.scores, held_out.ratings, self.feedback_loss)
            metrics["loss"] = metrics["loss"] if self._val_pairs else metrics["feedback_loss"]
        self._diagnosis = diagnosis(RankedAnswers(*(x.cpu() if isinstance(x, Tensor) else x for x in held_out)))
        if self._diagnosis:
            metrics["calibration_error"] = torch.tensor(self._diagnosis["calibration_error"])
        return metrics

    def parameter_groups(self) -> list[dict[str, Any]]:
        return decay_groups(self.reward_model, head_parameters(self.reward_model), self.head_lr)

    def scores(
        self, sequences: Sequence[Sequence[int]], lengths: Sequence[int] | None = None, batch_size: int = 64
    ) -> Tensor:
        """Scores (N,) of token sequences, of which ``lengths`` (N,) tokens at the end are the answers."""
        training = self.reward_model.training
        self.reward_model.eval()
        bar = partial(inner_bar, self._trainer, description="reward: calibration")
        pad_id = self.tokenizer.pad_token_id
        scores = score_sequences(self.reward_model, sequences, lengths, pad_id, batch_size, bar)
        self.reward_model.train(training)
        return scores

    def end_sharding(self) -> None:
        """Calibrate while the model is sharded, in all processes, and make it a plain one in the first."""
        self.calibrate()
        super().end_sharding()

    def calibrate(self) -> None:
        """Shift the scores so that demonstrations average 0 (InstructGPT, section 3.5), and note how they are spread.

        All goes into config.json: ``score = logit + score_shift``, and PPO divides by ``score_std``."""
        if self.calibration is None:
            raise UserError(
                "RewardModule: the scores are not calibrated, as no answers were given for that; make it with "
                "calibration=data.calibration (or **data.for_module(), which has all that comes from the data)"
            )
        self.reward_model.config.score_shift = 0.0
        demonstrations = self._scored(self.calibration.demonstrations)
        self.reward_model.config.score_shift = -demonstrations.mean().item()
        scores = self._scored(self.calibration.answers)
        self.reward_model.config.score_mean = scores.mean().item()
        self.reward_model.config.score_std = max(scores.std().item(), 1e-6)

    def _scored(self, answered: Sequence[PromptAndAnswer]) -> Tensor:
        return self.scores([sequence for sequence, _ in answered], [length for _, length in answered])

    def figures(self) -> dict[str, Any]:
        """Headline figures, from the last validation."""
        beside = {}
        if self.bag_of_words:
            from lit_rlhf.stages.reward.baseline import bag_of_words_accuracy  # scikit-learn takes a second to import

            beside["bag_of_words_accuracy"] = bag_of_words_accuracy(*self.rankings)
        return {**super().figures(), **beside, **self._diagnosis}

    def export(self, folder: Path) -> None:
        """Write ``model/``: with the plain head a sequence classifier that transformers loads, its logit being the
        score before the shift; with another, a folder that ``load_reward_model`` alone reads. With LoRA and the plain
        head also ``adapter/``, which has the head within and not the shift."""
        if self._trainer is None or not isinstance(self._trainer.strategy, FSDP2):  # else it is done
            self.calibrate()
        super().export(folder)
