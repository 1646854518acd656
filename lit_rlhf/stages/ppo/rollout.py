"""Rollouts: sampled sequences with log-probs, values, rewards and advantages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

# What PPO draws random numbers for.
ROLLOUT, ORDER, VALIDATION, TEXT, PROBE = 0, 1, 3, 4, 5


@dataclass
class Rollout:
    """N sequences, with up to T tokens that the policy wrote, and everything that is learned from them.

    The policy's tokens may stand anywhere in a sequence (a dialogue has several of its turns, with tokens from
    elsewhere between them): ``response_mask`` says where. Tensors hold those tokens alone, in order. A is T where every
    token is an action, and 1 where all of a sequence's are one. The token ids are those that were sampled: never
    decoded and tokenized again."""

    sequences: list[list[int]]  # N token lists, prompt and response
    response_mask: list[list[bool]]  # one per token of each sequence, True = written by the policy
    mask: Tensor  # (N, A) bool, True = action that is learned from
    old_logprobs: Tensor  # (N, A) nats, under the policy that sampled
    ref_logprobs: Tensor  # (N, A) nats, under the reference
    values: Tensor  # (N, A) the critic's, before each action; 0 without one
    rewards: Tensor  # (N, A) KL penalty on every action, score on the last
    advantages: Tensor  # (N, A)
    returns: Tensor  # (N, A) the critic's targets; 0 without one

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def lengths(self) -> Tensor:
        """Tokens (N,) that the policy wrote in each sequence."""
        return torch.tensor([sum(mask) for mask in self.response_mask], device=self.mask.device)

    def select(self, index: Tensor) -> Rollout:
        """The sequences at ``index`` (M,), cut to the widest of them."""
        chosen = index.tolist()
        masks = [self.response_mask[i] for i in chosen]
        width = max(sum(mask) for mask in masks)
        names = ("mask", "old_logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns")
        tensors = {name: getattr(self, name)[index, :width] for name in names}
        return Rollout([self.sequences[i] for i in chosen], masks, **tensors)

    def shuffled(self, minibatch_size: int, generator: Generator) -> Iterator[Rollout]:
        """Minibatches of all sequences, in an order drawn from ``generator`` (on the CPU)."""
        for index in torch.randperm(len(self), generator=generator).split(minibatch_size):
            yield self.select(index.to(self.mask.device))
