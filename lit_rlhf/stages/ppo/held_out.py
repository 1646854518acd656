"""Policy against SFT model on held-out prompts: what a validation of PPO measures."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lit_rlhf.functional import WinRate, population_std, sequence_kl, win_rate
from lit_rlhf.models.responses import response_logprobs, stacked
from lit_rlhf.stages.ppo.collector import Answered, Collector
from lit_rlhf.stages.prompts import PromptBatch, repeated
from lit_rlhf.training.all_processes import interleaved


class Compared(NamedTuple):
    """K answers to a prompt, with the values that they are compared by."""

    worth: Tensor  # (K,) gold grades, or scores where there is no judge
    scores: Tensor  # (K,) reward units
    texts: list[str]  # of which equal ones tie


class Tested(NamedTuple):
    """Answers of both models to one prompt."""

    policy: Compared
    sft: Compared
    kl: Tensor  # (K,) nats per answer of the policy, against the SFT model
    correct: Tensor | None  # (K,) by the judge, of the policy's answers


class HeldOut:
    """One validation, batch by batch.

    Args:
        samples: K, answers per prompt.
    """

    wins: WinRate  # of the last validation

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self._reference: dict[int, list[Compared]] = {}  # batch -> the SFT model's answers, which stay the same
        self.begin()

    def begin(self) -> None:
        """Forget the answers of the last validation."""
        self._tested: list[Tested] = []

    def add(self, parts: list[list[Tested]]) -> None:
        """Add the prompts of a batch, which were dealt out in turn to as many processes as there are parts."""
        self._tested += interleaved(parts)

    def answered(self, collector: Collector, batch: PromptBatch, place: int, seeds: list[int]) -> list[Tested]:
        """Both models answer this process's prompts of batch number ``place``, from a seed per answer."""
        prompts, policy = repeated(batch, self.samples), collector.policy
        answered = collector.answer(policy, prompts, seeds)
        grades = collector.grades(answered)
        with collector.reference.as_it_began(policy) as sft:
            temperature = collector.sampling.temperature
            name = "the log-probs of the reference"
            ref_logprobs = stacked([response_logprobs(sft, packed, temperature, name) for packed in answered.batches])
            if place not in self._reference or collector.scorer.scoring.scale == "running":  # which goes on
                beside = collector.answer(sft, prompts, seeds)
                self._reference[place] = self._compared(collector, beside, collector.grades(beside))
        kl = self._by_prompt(sequence_kl(answered.responses.logprobs, ref_logprobs, answered.responses.mask))
        correct = [None] * len(kl) if grades is None else self._by_prompt(grades["correct"])
        return [*map(Tested, self._compared(collector, answered, grades), self._reference[place], kl, correct)]

    def _compared(self, collector: Collector, answered: Answered, grades: dict[str, Tensor] | None) -> list[Compared]:
        responses, texts, k = answered.responses, answered.texts, self.samples
        scores = collector.scorer.shape(answered.raw_scores, responses.lengths, responses.finished)
        worth = self._by_prompt(scores if grades is None else grades["gold"])
        grouped = [texts[i : i + k] for i in range(0, len(texts), k)]
        return [*map(Compared, worth, self._by_prompt(scores), grouped)]

    def _by_prompt(self, values: Tensor) -> list[Tensor]:
        return [row.clone() for row in values.view(-1, self.samples)]  # of a view all of it would be sent

    def metrics(self) -> dict[str, Tensor]:
        """Means over all prompts; ``wins`` has the win rate's interval."""
        policy, sft, kl, correct = zip(*self._tested)
        (worth, scores), (sft_worth, sft_scores) = (
            (torch.stack([each.worth for each in side]), torch.stack([each.scores for each in side]))
            for side in (policy, sft)
        )
        texts = [each.texts for each in policy], [each.texts for each in sft]
        self.wins = win_rate(worth.cpu(), sft_worth.cpu(), texts)
        scored = sft_scores[~sft_scores.isnan()]  # by anybody
        metrics = {
            "win_rate": scores.new_tensor(self.wins.mean),
            "kl": torch.cat(kl).mean(),
            "score": scores.nanmean(),
            "sft_score": scored.mean(),
            "sft_score_std": population_std(scored),
        }
        if correct[0] is not None:
            metrics |= {"gold": worth.mean(), "correct": torch.cat(correct).mean()}
        return metrics
