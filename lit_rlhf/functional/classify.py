"""Discriminative fine-tuning (GPT-1, section 3.2 and 3.3): what is made of the hidden states at the extract tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_rlhf.functional.lm import token_logprobs


def added(hidden: Tensor, example: Tensor) -> Tensor:
    """Hidden states (B, D) of each example: the sum over its inputs (GPT-1, section 3.3, similarity).

    ``hidden`` (N, D) are the states of N inputs, ``example`` (N,) says which example each belongs to, 0 to B - 1. An
    example with one input keeps its state.

    >>> added(torch.tensor([[1.0, 2.0], [10.0, 20.0], [5.0, 5.0]]), torch.tensor([0, 0, 1]))
    tensor([[11., 22.],
            [ 5.,  5.]])
    """
    size = int(example.max()) + 1
    return hidden.new_zeros(size, hidden.shape[-1]).index_add(0, example, hidden)


def side_by_side(scores: Tensor, example: Tensor) -> Tensor:
    """Scores (B, K) of each example's choices, in order; -inf where an example has fewer than K, the most of any.

    ``scores`` (N,) are those of N inputs, one per choice; ``example`` (N,) is ascending. Their softmax is over the
    choices (GPT-1, section 3.3, question answering).

    >>> side_by_side(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), torch.tensor([0, 0, 0, 1, 1]))
    tensor([[1., 2., 3.],
            [4., 5., -inf]])
    """
    counts = torch.bincount(example)
    place = torch.arange(len(example), device=example.device) - (counts.cumsum(0) - counts)[example]
    table = scores.new_full((len(counts), int(counts.max())), -torch.inf)
    return table.index_put((example, place), scores)


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of -log P(y | x) in nats, L2 of GPT-1 (eq. 4), negated; ``logits`` (B, C), ``labels`` (B,) int64.

    >>> logits = torch.tensor([[0.2, 0.3, 0.5]]).log()
    >>> classification_loss(logits, torch.tensor([2])).exp()
    tensor(2.)
    """
    return -token_logprobs(logits, labels).mean()
