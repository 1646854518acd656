"""The policy's losses, from the plain policy gradient to PPO, the critic's, and what one watches beside them.

Every policy loss maps ``(logprobs, old_logprobs, advantages, mask)`` to a scalar, the mean over valid tokens. Tensors
are (B, T), log-probs in nats, mask True = response token; where an answer is one action, T is 1."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_rlhf.functional.masking import check_shapes, masked_mean


def policy_gradient_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """``-E[A_t log pi(a_t|s_t)]``, whose gradient is the policy gradient (REINFORCE, Williams 1992).

    ``old_logprobs`` is not looked at: it is right only for the policy that sampled.

    >>> logprobs, mask = torch.tensor([[-1.0, -2.0]]), torch.tensor([[True, True]])
    >>> policy_gradient_loss(logprobs, logprobs, torch.tensor([[3.0, 1.0]]), mask)
    tensor(2.5000)
    """
    check_shapes(logprobs=logprobs, advantages=advantages, mask=mask)
    return -masked_mean(_fill(logprobs, mask) * _fill(advantages, mask), mask)


def importance_weighted_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """``-E[rho_t A_t]`` with ``rho_t = pi(a_t|s_t) / pi_old(a_t|s_t)`` (arXiv:1707.06347, eq. 6): also right after the
    policy has moved on from the one that sampled, for as long as the ratios stay near 1.

    >>> logprobs, old_logprobs = torch.tensor([[0.5]]).log(), torch.tensor([[0.25]]).log()  # a ratio of 2
    >>> importance_weighted_loss(logprobs, old_logprobs, torch.tensor([[3.0]]), torch.tensor([[True]]))
    tensor(-6.)
    """
    check_shapes(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    return -masked_mean(_fill(logprobs - old_logprobs, mask).exp() * _fill(advantages, mask), mask)


def kl_penalty_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, beta: float | Tensor
) -> Tensor:
    """``-E[rho_t A_t - beta KL(pi_old || pi)]`` (arXiv:1707.06347, eq. 8), ``beta`` in reward units per nat.

    The divergence from the policy that sampled, not from the reference. It is estimated from its samples by
    ``rho - 1 - log rho``: unbiased, never negative, and with a derivative of the right expectation.

    >>> logprobs, old_logprobs = torch.tensor([[0.5]]).log(), torch.tensor([[0.25]]).log()  # a ratio of 2
    >>> kl_penalty_loss(logprobs, old_logprobs, torch.tensor([[3.0]]), torch.tensor([[True]]), beta=1.0)
    tensor(-5.6931)
    """
    check_shapes(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    log_ratio = _fill(logprobs - old_logprobs, mask)
    surrogate = log_ratio.exp() * _fill(advantages, mask)
    return -masked_mean(surrogate - beta * (log_ratio.expm1() - log_ratio), mask)


def adapted_beta(beta: float, kl: float, target: float) -> float:
    """``beta`` of :func:`kl_penalty_loss` for the next rollout (arXiv:1707.06347, section 4): half where the divergence
    ``kl`` (nats per token) stayed below two thirds of ``target``, double where it was above one and a half of it.

    >>> [adapted_beta(1.0, kl, target=0.01) for kl in (0.005, 0.01, 0.02)]
    [0.5, 1.0, 2.0]
    """
    return beta / 2 if kl < target / 1.5 else beta * 2 if kl > target * 1.5 else beta


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_range: float
) -> Tensor:
    """PPO clipped surrogate, negated (arXiv:1707.06347, eq. 7).

    Tensors are (B, T), log-probs in nats, mask True = response token; returns a scalar, the mean over valid tokens.

    >>> logprobs, old_logprobs = torch.tensor([[0.5]]).log(), torch.tensor([[0.25]]).log()  # a ratio of 2
    >>> for advantage in (torch.tensor([[1.0]]), torch.tensor([[-1.0]])):
    ...     clipped_policy_loss(logprobs, old_logprobs, advantage, torch.tensor([[True]]), clip_range=0.2)
    tensor(-1.2000)
    tensor(2.)
    """
    check_shapes(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    ratio = _fill(logprobs - old_logprobs, mask).exp()
    advantages = _fill(advantages, mask)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -masked_mean(torch.min(ratio * advantages, clipped * advantages), mask)


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, value_clip_range: float | None
) -> Tensor:
    """Half the squared error of the critic, its step clipped to ``value_clip_range`` (None: not clipped).

    As in OpenAI's baselines: ``0.5 E[max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2)]``.
    Tensors are (B, T) in reward units, mask True = response token; returns a scalar.

    >>> values, old_values, returns = torch.tensor([[1.0]]), torch.tensor([[0.0]]), torch.tensor([[1.0]])
    >>> clipped_value_loss(values, old_values, returns, torch.tensor([[True]]), value_clip_range=0.2)  # 0.5 * 0.8 ** 2
    tensor(0.3200)
    """
    check_shapes(values=values, old_values=old_values, returns=returns, mask=mask)
    values, old_values, returns = _fill(values, mask), _fill(old_values, mask), _fill(returns, mask)
    errors = (values - returns) ** 2
    if value_clip_range is not None:
        clipped = old_values + (values - old_values).clamp(-value_clip_range, value_clip_range)
        errors = torch.max(errors, (clipped - returns) ** 2)
    return 0.5 * masked_mean(errors, mask)


def clip_fraction(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, clip_range: float) -> Tensor:
    """Fraction of valid tokens whose ratio left ``[1 - clip_range, 1 + clip_range]``; (B, T) in, a scalar out.

    >>> logprobs, old_logprobs = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.45]]).log()
    >>> clip_fraction(logprobs, old_logprobs, torch.tensor([[True, True]]), clip_range=0.2)
    tensor(0.5000)
    """
    check_shapes(logprobs=logprobs, old_logprobs=old_logprobs, mask=mask)
    ratio = (logprobs - old_logprobs).exp()
    return masked_mean(((ratio - 1).abs() > clip_range).float(), mask)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """``1 - Var(R - V) / Var(R)`` over valid tokens: 1 is a perfect critic, 0 one no better than a constant.

    (B, T) in, a scalar out; 0 where the returns do not vary.

    >>> returns, mask = torch.tensor([[0.0, 4.0]]), torch.tensor([[True, True]])
    >>> explained_variance(torch.tensor([[1.0, 3.0]]), returns, mask)
    tensor(0.7500)
    """
    check_shapes(values=values, returns=returns, mask=mask)
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
