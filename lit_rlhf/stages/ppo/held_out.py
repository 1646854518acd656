"""Policy against SFT model on held-out prompts: what a validation of PPO measures."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_rlhf.functional import WinRate, population_std, sequence_kl, win_rate
from lit_rlhf.models import response_logprobs, stacked
from lit_rlhf.rollouts import Responses
from lit_rlhf.stages.ppo.rollout import VALIDATION, record_of
from lit_rlhf.stages.prompts import PromptBatch, repeated
from lit_rlhf.text.packing import Packed

if TYPE_CHECKING:
    from lit_rlhf.stages.ppo.module import PPOModule


class Compared(NamedTuple):
    """What K answers to each of P prompts are compared by."""

    worth: Tensor  # (P, K) gold grades, or scores where there is no judge
    scores: Tensor  # (P, K) reward units
    texts: list[list[str]]  # (P, K), of which equal ones tie


class Answered(NamedTuple):
    """N answers to held-out prompts, K to each of P."""

    answers: Responses
    packed: list[Packed]
    correct: Tensor | None  # (N,) by the gold judge
    compared: Compared


class HeldOut:
    """One validation, batch by batch.

    Every process answers all held-out prompts with the same random numbers, so there is nothing to gather.

    Args:
        samples: K, answers a prompt.
    """

    wins: WinRate  # of the last validation

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self._reference: dict[int, Compared] = {}  # batch -> the SFT model's answers, which stay the same
        self.begin()

    def begin(self) -> None:
        """Forget the answers of the last validation."""
        self._answered: list[Answered] = []
        self._beside: list[Compared] = []  # the SFT model's, to the same prompts
        self._kl: list[Tensor] = []  # (N,) nats an answer, against the SFT model

    def add(self, module: PPOModule, batch: PromptBatch, place: int) -> None:
        """Both models answer the prompts of batch number ``place``."""
        batch = repeated(batch, self.samples)
        answered = self._answer(module, module.policy, batch, place)
        answers = answered.answers
        with module.reference.as_it_began(module.policy) as sft:
            temperature = module.sampling.temperature
            ref_logprobs = stacked(
                [response_logprobs(sft, p, p.response_lengths, temperature) for p in answered.packed]
            )
            if place not in self._reference or module.scorer.scoring.scale == "running":  # which goes on
                self._reference[place] = self._answer(module, sft, batch, place).compared
        self._answered.append(answered)
        self._beside.append(self._reference[place])
        self._kl.append(sequence_kl(answers.logprobs, ref_logprobs, answers.mask))

    def _answer(self, module: PPOModule, policy: PreTrainedModel, batch: PromptBatch, place: int) -> Answered:
        answers = module.sample(policy, batch.tokens, place, purpose=VALIDATION)
        packed = module.in_batches([p + r for p, r in zip(batch.tokens, answers.token_lists())], answers.lengths)
        texts = answers.texts(module.tokenizer)
        raw = module.scorer.raw(packed, batch.messages, texts, record_of(batch, answers))
        scores = module.scorer.shape(raw, answers.lengths, answers.finished)
        grades = module.grades(batch.messages, texts, answers.finished)
        correct, worth = (None, scores) if grades is None else (grades["correct"], grades["gold"])
        grouped = [texts[i : i + self.samples] for i in range(0, len(texts), self.samples)]
        compared = Compared(worth.view(-1, self.samples), scores.view(-1, self.samples), grouped)
        return Answered(answers, packed, correct, compared)

    def metrics(self) -> dict[str, Tensor]:
        """Means over all batches; ``wins`` has the win rate's interval."""
        policy, sft = _together([a.compared for a in self._answered]), _together(self._beside)
        self.wins = win_rate(policy.worth.cpu(), sft.worth.cpu(), (policy.texts, sft.texts))
        scored = sft.scores[~sft.scores.isnan()]  # by anybody
        metrics = {
            "win_rate": policy.scores.new_tensor(self.wins.mean),
            "kl": torch.cat(self._kl).mean(),
            "score": policy.scores.nanmean(),
            "sft_score": scored.mean(),
            "sft_score_std": population_std(scored),
        }
        correct = [a.correct for a in self._answered if a.correct is not None]
        return metrics | {"gold": policy.worth.mean(), "correct": torch.cat(correct).mean()} if correct else metrics


def _together(batches: list[Compared]) -> Compared:
    worth, scores, texts = zip(*batches)
    return Compared(torch.cat(worth), torch.cat(scores), [row for rows in texts for row in rows])
