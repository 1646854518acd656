"""Policy against SFT model on held-out prompts: what a validation of PPO measures."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_rlhf.functional import WinRate, population_std, sequence_kl, win_rate
from lit_rlhf.models.responses import response_logprobs, stacked
from lit_rlhf.stages.ppo.collector import Answered, Collector
from lit_rlhf.stages.prompts import PromptBatch, repeated


class Compared(NamedTuple):
    """What K answers to each of P prompts are compared by."""

    worth: Tensor  # (P, K) gold grades, or scores where there is no judge
    scores: Tensor  # (P, K) reward units
    texts: list[list[str]]  # (P, K), of which equal ones tie


class HeldOut:
    """One validation, batch by batch.

    Every process answers all held-out prompts with the same random numbers, so there is nothing to gather.

    Args:
        samples: K, answers per prompt.
    """

    wins: WinRate  # of the last validation

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self._reference: dict[int, Compared] = {}  # batch -> the SFT model's answers, which stay the same
        self.begin()

    def begin(self) -> None:
        """Forget the answers of the last validation."""
        self._policy: list[Compared] = []
        self._beside: list[Compared] = []  # the SFT model's, to the same prompts
        self._kl: list[Tensor] = []  # (N,) nats per answer, against the SFT model
        self._correct: list[Tensor] = []  # (N,) by the judge, of the policy's answers

    def add(self, collector: Collector, batch: PromptBatch, place: int, seeds: list[int]) -> None:
        """Both models answer the prompts of batch number ``place``, from a seed per answer."""
        prompts, policy = repeated(batch, self.samples), collector.policy
        answered = collector.answer(policy, prompts, seeds)
        grades = collector.grades(answered)
        self._policy.append(self._compared(collector, answered, grades))
        if grades is not None:
            self._correct.append(grades["correct"])
        with collector.reference.as_it_began(policy) as sft:
            temperature = collector.sampling.temperature
            name = "the log-probs of the reference"
            ref_logprobs = stacked([response_logprobs(sft, packed, temperature, name) for packed in answered.batches])
            if place not in self._reference or collector.scorer.scoring.scale == "running":  # which goes on
                beside = collector.answer(sft, prompts, seeds)
                self._reference[place] = self._compared(collector, beside, collector.grades(beside))
        self._beside.append(self._reference[place])
        self._kl.append(sequence_kl(answered.responses.logprobs, ref_logprobs, answered.responses.mask))

    def _compared(self, collector: Collector, answered: Answered, grades: dict[str, Tensor] | None) -> Compared:
        responses, texts, k = answered.responses, answered.texts, self.samples
        scores = collector.scorer.shape(answered.raw, responses.lengths, responses.finished)
        worth = scores if grades is None else grades["gold"]
        grouped = [texts[i : i + k] for i in range(0, len(texts), k)]
        return Compared(worth.view(-1, k), scores.view(-1, k), grouped)

    def metrics(self) -> dict[str, Tensor]:
        """Means over all batches; ``wins`` has the win rate's interval."""
        policy, sft = _together(self._policy), _together(self._beside)
        self.wins = win_rate(policy.worth.cpu(), sft.worth.cpu(), (policy.texts, sft.texts))
        scored = sft.scores[~sft.scores.isnan()]  # by anybody
        metrics = {
            "win_rate": policy.scores.new_tensor(self.wins.mean),
            "kl": torch.cat(self._kl).mean(),
            "score": policy.scores.nanmean(),
            "sft_score": scored.mean(),
            "sft_score_std": population_std(scored),
        }
        if self._correct:
            metrics |= {"gold": policy.worth.mean(), "correct": torch.cat(self._correct).mean()}
        return metrics


def _together(batches: list[Compared]) -> Compared:
    worth, scores, texts = zip(*batches)
    return Compared(torch.cat(worth), torch.cat(scores), [row for rows in texts for row in rows])
