"""Proximal policy optimization: the clipped losses and what one watches beside them."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_rlhf.functional.masking import masked_mean


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_range: float
) -> Tensor:
    """PPO clipped surrogate, negated (arXiv:1707.06347, eq. 7).

    Tensors are (B, T), log-probs in nats, mask True = response token; returns a scalar, the mean over valid tokens."""
    ratio = _fill(logprobs - old_logprobs, mask).exp()
    advantages = _fill(advantages, mask)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -masked_mean(torch.min(ratio * advantages, clipped * advantages), mask)


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, value_clip_range: float | None
) -> Tensor:
    """Half the squared error of the critic, its step clipped to ``value_clip_range`` (None: not clipped).

    As in OpenAI's baselines: ``0.5 E[max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2)]``.
    Tensors are (B, T) in reward units, mask True = response token; returns a scalar."""
    values, old_values, returns = _fill(values, mask), _fill(old_values, mask), _fill(returns, mask)
    errors = (values - returns) ** 2
    if value_clip_range is not None:
        clipped = old_values + (values - old_values).clamp(-value_clip_range, value_clip_range)
        errors = torch.max(errors, (clipped - returns) ** 2)
    return 0.5 * masked_mean(errors, mask)


def clip_fraction(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, clip_range: float) -> Tensor:
    """Fraction of valid tokens whose ratio left ``[1 - clip_range, 1 + clip_range]``; (B, T) in, a scalar out."""
    ratio = (logprobs - old_logprobs).exp()
    return masked_mean(((ratio - 1).abs() > clip_range).float(), mask)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """``1 - Var(R - V) / Var(R)`` over valid tokens: 1 is a perfect critic, 0 one no better than a constant.

    (B, T) in, a scalar out; 0 where the returns do not vary."""
    total = _variance(returns, mask)
    # Equal returns have a variance of rounding errors, relative to their size, rather than 0.
    varies = total > (torch.finfo(returns.dtype).eps * 16) ** 2 * masked_mean(returns**2, mask)
    ratio = _variance(returns - values, mask) / torch.where(varies, total, torch.ones_like(total))
    return torch.where(varies, 1 - ratio, torch.zeros_like(total))


def _variance(x: Tensor, mask: Tensor) -> Tensor:
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)


def _fill(x: Tensor, mask: Tensor) -> Tensor:
    """0 at masked positions, before the arithmetic: 0 * NaN in the backward pass would spoil every gradient."""
    return x.masked_fill(~mask, 0.0)
