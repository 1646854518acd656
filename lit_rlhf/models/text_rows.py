"""Rows of text, and a language model's loss on them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_rlhf.errors import UserError
from lit_rlhf.models.chunked import token_logprobs_of
from lit_rlhf.models.gathering import gathers
from lit_rlhf.models.policy import context_length


class TextRows(NamedTuple):
    """B windows of T + 1 tokens: each token predicts the next."""

    tokens: Tensor  # (B, T + 1) int64

    def to(self, device: torch.device) -> TextRows:
        """The rows on ``device``."""
        return TextRows(self.tokens.to(device))

    @property
    def inputs(self) -> Tensor:
        """(B, T)"""
        return self.tokens[:, :-1]

    @property
    def labels(self) -> Tensor:
        """(B, T)"""
        return self.tokens[:, 1:]


@gathers
def text_loss(policy: PreTrainedModel, rows: TextRows) -> Tensor:
    """Mean next-token loss on rows of text, in nats per token (GPT-1, eq. 1)."""
    hidden = policy.base_model(input_ids=rows.inputs, use_cache=False).last_hidden_state
    return -token_logprobs_of(policy, hidden, rows.labels).mean()


def check_rows(policy: PreTrainedModel, block_size: int, address: str) -> None:
    """Raise ``UserError`` where rows of ``block_size`` tokens do not fit into the model's context."""
    if block_size > context_length(policy):
        raise UserError(
            f"{address}={block_size} is more than the model's context of {context_length(policy)} tokens; give that or "
            "fewer"
        )
