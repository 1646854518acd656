"""Experience: what the policy wrote, how likely it was, what it was worth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor
from transformers import PreTrainedModel

from lit_rlhf.functional import token_logprobs
from lit_rlhf.models import Responses, next_token_logits, packed_hidden, predicting_positions, response_positions
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


def response_logits(
    policy: PreTrainedModel, hidden: Tensor, packed: Packed, lengths: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, tokens, mask) of the responses only: (M, V), (M,) and (N, T) with M Trues; ``hidden`` (T, D).

    Logits are divided by the temperature that was sampled with, in the reference too: both are then distributions over
    what could have been drawn."""
    positions, mask = response_positions(packed, lengths)
    logits = next_token_logits(policy, hidden[predicting_positions(packed, lengths)[0][mask]])
    logits = logits if temperature == 1 else logits / temperature
    return logits, packed.tokens[positions[mask]], mask


def response_logprobs(policy: PreTrainedModel, packed: Packed, lengths: Tensor, temperature: float) -> Tensor:
    """Log-probs (N, T) of the response tokens, in nats; 0 elsewhere."""
    logits, tokens, mask = response_logits(policy, packed_hidden(policy, packed), packed, lengths, temperature)
    return scatter(token_logprobs(logits, tokens), mask)


def response_values(values: Tensor, packed: Packed, lengths: Tensor) -> Tensor:
    """The value (N, T) of the state before each response token, out of those (T,) at all tokens; 0 elsewhere."""
    positions, mask = predicting_positions(packed, lengths)
    return scatter(values[positions[mask]], mask)


def scatter(values: Tensor, mask: Tensor) -> Tensor:
    """(N, T) with ``values`` (M,) where ``mask`` is True, in order, and 0 elsewhere; gradients pass through."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def record_of(prompts: PromptBatch, answers: Responses) -> dict[str, list[Any]]:
    """What reward functions get to know besides prompts and answers, a list each."""
    names = dict.fromkeys(name for record in prompts.records for name in record)
    columns = {name: [record.get(name) for record in prompts.records] for name in names}
    return {**columns, "kind": prompts.kinds, "finished": answers.finished.tolist()}
