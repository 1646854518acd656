"""Language modelling: next-token log-probabilities, loss and entropy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_rlhf.functional.masking import check_shapes, masked_mean


def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability, in nats, of each of ``targets`` (...) under ``logits`` (..., V); same shape as targets.

    ``cross_entropy`` is the fastest way to it on a CPU, and never holds a second (..., V) tensor of probabilities. A
    target that is no token, -100 among them, is an error (``IndexError`` on a CPU), where that would say 0 of it.

    >>> logits = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log()
    >>> token_logprobs(logits, torch.tensor([1, 0])).exp()
    tensor([0.7500, 0.5000])
    """
    check_shapes(**{"targets": targets, "logits without the vocabulary": logits[..., 0]})
    rows, none = _full(logits).reshape(-1, logits.shape[-1]), torch.iinfo(torch.int64).min
    return -F.cross_entropy(rows, targets.reshape(-1), ignore_index=none, reduction="none").view(targets.shape)


def lm_loss(logits: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean negative log-likelihood per token, ``-log P(u_i | u_<i)`` (GPT-1, eq. 1), in nats; a scalar.

    ``logits`` (B, T, V) predict ``labels`` (B, T) at the same index (already shifted);
    ``mask`` (B, T) is True where a label counts: response tokens in SFT; None, in pretraining: every token.

    >>> logits, labels = torch.tensor([[[0.25, 0.75], [0.5, 0.5]]]).log(), torch.tensor([[1, 0]])
    >>> lm_loss(logits, labels, mask=torch.tensor([[False, True]]))  # log 2
    tensor(0.6931)
    """
    if mask is None:
        return -token_logprobs(logits, labels).mean()
    # Filled before the arithmetic: 0 * NaN in the backward pass would spoil every gradient.
    logits = logits.masked_fill(~mask[..., None], 0.0)
    return -masked_mean(token_logprobs(logits, labels.clamp(min=0)), mask)


def token_entropy(logits: Tensor) -> Tensor:
    """Entropy (...) of the next-token distribution ``logits`` (..., V), in nats.

    >>> token_entropy(torch.tensor([[0.0, 0.0], [0.0, -torch.inf]]))  # log 2, and nothing left open
    tensor([0.6931, 0.0000])
    """
    entropies: Tensor = torch.special.entr(torch.softmax(_full(logits), dim=-1))
    return entropies.sum(-1)  # 0 log 0 = 0: tokens may be ruled out


def _full(logits: Tensor) -> Tensor:
    """At least float32: half precision loses rare tokens."""
    return logits if logits.dtype == torch.float64 else logits.float()
