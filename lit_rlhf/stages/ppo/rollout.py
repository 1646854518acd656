"""Experience: what the policy wrote, how likely it was, what it was worth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from transformers import PreTrainedModel

from lit_rlhf.models import (
    Responses,
    packed_hidden,
    predicting_positions,
    response_positions,
    token_logprobs_of,
)
from lit_rlhf.stages.prompts import PromptBatch
from lit_rlhf.text.packing import Packed

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


class Responding(NamedTuple):
    """The M response tokens of N packed sequences, sequence by sequence."""

    tokens: Tensor  # (M,) int64
    before: Tensor  # (M,) int64, flat indices of the tokens that predict them
    mask: Tensor  # (N, T) bool with M Trues, where T is the longest response

    @classmethod
    def of(cls, packed: Packed, lengths: Tensor) -> Responding:
        """The last ``lengths`` (N,) tokens of the sequences."""
        (positions, mask), (before, _) = response_positions(packed, lengths), predicting_positions(packed, lengths)
        return cls(packed.tokens[positions[mask]], before[mask], mask)


def response_logprobs(policy: PreTrainedModel, packed: Packed, lengths: Tensor, temperature: float) -> Tensor:
    """Log-probs (N, T) of the response tokens, in nats, of logits divided by the ``temperature``; 0 elsewhere."""
    response = Responding.of(packed, lengths)
    hidden = packed_hidden(policy, packed, at=response.before)
    return scatter(token_logprobs_of(policy, hidden, response.tokens, temperature), response.mask)


def scatter(values: Tensor, mask: Tensor) -> Tensor:
    """(N, T) with ``values`` (M,) where ``mask`` is True, in order, and 0 elsewhere; gradients pass through."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def stacked(tables: Sequence[Tensor]) -> Tensor:
    """(n, T) of several batches as one (N, T), filled up by 0 to the widest."""
    width = max(table.shape[1] for table in tables)
    return torch.cat([F.pad(table, (0, width - table.shape[1])) for table in tables])


def record_of(prompts: PromptBatch, answers: Responses) -> dict[str, list[Any]]:
    """What reward functions get to know besides prompts and answers, a list each."""
    names = dict.fromkeys(name for record in prompts.records for name in record)
    columns = {name: [record.get(name) for record in prompts.records] for name in names}
    return {**columns, "kind": prompts.kinds, "finished": answers.finished.tolist()}
