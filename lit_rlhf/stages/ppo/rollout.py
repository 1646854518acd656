"""Experience: what the policy wrote, how likely it was, what it was worth."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from transformers import PreTrainedModel

from lit_rlhf.functional import token_logprobs
from lit_rlhf.models import next_token_logits, packed_hidden, response_positions
from lit_rlhf.text.packing import Packed, pack


@dataclass
class Rollout:
    """N sampled answers of up to T tokens with everything that is learned from them.

    The token ids are those that were sampled: never decoded and tokenized again."""

    sequences: list[list[int]]  # N token lists, prompt and response
    lengths: Tensor  # (N,) int64, tokens of each response, end-of-text included
    mask: Tensor  # (N, T) bool, True = response token
    old_logprobs: Tensor  # (N, T) nats, under the policy that sampled
    ref_logprobs: Tensor  # (N, T) nats, under the reference
    values: Tensor  # (N, T) the critic's, before each token
    rewards: Tensor  # (N, T) KL penalty on every token, score on the last
    advantages: Tensor  # (N, T) whitened
    returns: Tensor  # (N, T) the critic's targets

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


def pack_on(sequences: list[list[int]], pad_id: int, device: torch.device) -> Packed:
    """Packed rows on ``device``."""
    return Packed(*(tensor.to(device) for tensor in pack(sequences, pad_id)))


def response_logits(
    policy: PreTrainedModel, packed: Packed, lengths: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, tokens, mask) of the responses only: (M, V), (M,) and (N, T) with M Trues.

    Logits are divided by the temperature that was sampled with, in the reference too: both are then distributions over
    what could have been drawn."""
    positions, mask = response_positions(packed, lengths)
    flat = positions[mask]
    hidden = packed_hidden(policy, packed)[flat - 1]  # the token before predicts
    return next_token_logits(policy, hidden) / temperature, packed.tokens.flatten()[flat], mask


def response_logprobs(policy: PreTrainedModel, packed: Packed, lengths: Tensor, temperature: float) -> Tensor:
    """Log-probs (N, T) of the response tokens, in nats; 0 elsewhere."""
    logits, tokens, mask = response_logits(policy, packed, lengths, temperature)
    return scatter(token_logprobs(logits, tokens), mask)


def response_values(critic: PreTrainedModel, packed: Packed, lengths: Tensor) -> Tensor:
    """The critic's value (N, T) of the state before each response token; 0 elsewhere."""
    positions, mask = response_positions(packed, lengths)
    hidden = packed_hidden(critic, packed)[positions[mask] - 1]
    return scatter(critic.score(hidden).squeeze(-1).float(), mask)


def scatter(values: Tensor, mask: Tensor) -> Tensor:
    """(N, T) with ``values`` (M,) where ``mask`` is True, in order, and 0 elsewhere; gradients pass through."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)
