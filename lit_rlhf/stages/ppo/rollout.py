"""Experience: what the policy wrote, how likely it was, what it was worth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from lit_rlhf.rollouts import Responses
from lit_rlhf.stages.prompts import PromptBatch

ROLLOUT, ORDER, SAMPLES, VALIDATION, TEXT, PROBE = range(6)  # what PPO draws random numbers for


@dataclass
class Rollout:
    """N sampled answers of up to T tokens with everything that is learned from them.

    A is T where every token is an action, and 1 where the whole answer is one. The token ids are those that were
    sampled: never decoded and tokenized again."""

    sequences: list[list[int]]  # N token lists, prompt and response
    lengths: Tensor  # (N,) int64, tokens of each response, end-of-text included
    mask: Tensor  # (N, A) bool, True = action
    old_logprobs: Tensor  # (N, A) nats, under the policy that sampled
    ref_logprobs: Tensor  # (N, A) nats, under the reference
    values: Tensor  # (N, A) the critic's, before each action; 0 without one
    rewards: Tensor  # (N, A) KL penalty on every action, score on the last
    advantages: Tensor  # (N, A)
    returns: Tensor  # (N, A) the critic's targets; 0 without one

    def __len__(self) -> int:
        return len(self.sequences)

    def select(self, index: Tensor) -> Rollout:
        """The answers at ``index`` (M,), cut to the longest of them."""
        width = int(self.lengths[index].max())
        names = ("mask", "old_logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns")
        return Rollout(
            [self.sequences[i] for i in index.tolist()],
            self.lengths[index],
            **{name: getattr(self, name)[index, :width] for name in names},
        )

    def shuffled(self, minibatch_size: int, generator: Generator) -> Iterator[Rollout]:
        """Minibatches of all answers, in an order drawn from ``generator`` (on the CPU)."""
        for index in torch.randperm(len(self), generator=generator).split(minibatch_size):
            yield self.select(index.to(self.lengths.device))


def record_of(prompts: PromptBatch, answers: Responses) -> dict[str, list[Any]]:
    """What reward functions get to know besides prompts and answers, a list each."""
    names = dict.fromkeys(name for record in prompts.records for name in record)
    columns = {name: [record.get(name) for record in prompts.records] for name in names}
    return {**columns, "kind": prompts.kinds, "finished": answers.finished.tolist()}
