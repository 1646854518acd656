"""Log-probs of the responses in packed sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from lit_rlhf.models.chunked import token_logprobs_of
from lit_rlhf.models.finite import finite
from lit_rlhf.models.policy import packed_hidden, predicting_positions, response_positions
from lit_rlhf.text.packing import Packed


class Responding(NamedTuple):
    """The M response tokens of N packed sequences, sequence by sequence, wherever in them they stand."""

    tokens: Tensor  # (M,) int64
    before: Tensor  # (M,) int64, flat indices of the tokens that predict them
    mask: Tensor  # (N, T) bool with M Trues, where T is the largest number of response tokens: those first, in order

    @classmethod
    def of(cls, packed: Packed) -> Responding:
        """The responses that the batch names."""
        (positions, mask), (before, _) = response_positions(packed), predicting_positions(packed)
        return cls(packed.tokens[positions[mask]], before[mask], mask)


def response_logprobs(
    policy: PreTrainedModel, packed: Packed, temperature: float = 1.0, name: str = "the log-probs of the policy"
) -> Tensor:
    """Log-probs (N, T) of the response tokens, in nats, of logits divided by the ``temperature``; 0 elsewhere.

    Raises :class:`lit_rlhf.errors.NotFinite`, with their ``name``, where they are not finite."""
    response = Responding.of(packed)
    hidden = packed_hidden(policy, packed, at=response.before)
    logprobs = finite(token_logprobs_of(policy, hidden, response.tokens, temperature), name)
    return scatter(logprobs, response.mask)


def scatter(values: Tensor, mask: Tensor) -> Tensor:
    """(N, T) with ``values`` (M,) where ``mask`` is True, in order, and 0 elsewhere; gradients pass through."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def stacked(tables: Sequence[Tensor]) -> Tensor:
    """(n, T) of several batches as one (N, T), filled up by 0 to the widest."""
    width = max(table.shape[1] for table in tables)
    return torch.cat([F.pad(table, (0, width - table.shape[1])) for table in tables])
