"""How the next token is drawn."""

from __future__ import annotations

import torch
from torch import Generator, Tensor


def filter_logits(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Keep the ``top_k`` most likely tokens (0: all) and of these the fewest of mass ``top_p`` (arXiv:1904.09751).

    ``logits`` (B, V); the others become -inf. The most likely token is always kept."""
    if top_k > 0:
        kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(-1)
        beyond = probs.cumsum(-1) - probs >= top_p  # mass before this token already reaches top_p
        beyond[:, 0] = False
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), float("-inf"))
    return logits


def sample_token(logits: Tensor, generator: Generator | None = None, uniform: Tensor | None = None) -> Tensor:
    """One token id (B,) from each row of ``logits`` (B, V), by inverting the cumulative distribution.

    The same distribution as ``torch.multinomial``, at a fraction of its cost for one draw a row. The
    numbers drawn from [0, 1) can be given as ``uniform`` (B,) float64. Raises ``ValueError``
    where a row is no distribution (a NaN, or -inf throughout)."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    if not torch.isfinite(cumulative[:, -1]).all():
        raise ValueError("the logits are not finite, so no token can be sampled: the model has diverged")
    if uniform is None:
        uniform = torch.rand(logits.shape[0], generator=generator, dtype=torch.float64, device=logits.device)
    # Scaled by the total, which rounding leaves next to 1, so that the draw never falls past the last possible token.
    return (
        torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
        .squeeze(-1)
        .clamp(max=logits.shape[-1] - 1)
    )
