"""Rewards and advantages of a rollout."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_rlhf.functional.masking import last_position


def token_rewards(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Rewards (B, T): a KL penalty on every token and the score on the last real one (InstructGPT, eq. 2).

    ``r_t = -kl_coef (log pi(a_t|s_t) - log pi_ref(a_t|s_t)) + [t last] score``. ``scores`` (B,); the others (B, T),
    log-probs in nats, mask True = response token; 0 elsewhere."""
    rewards = torch.where(mask, -kl_coef * (logprobs - ref_logprobs), torch.zeros_like(logprobs))
    last = last_position(mask)
    return rewards.scatter_add(1, last[:, None], scores[:, None].to(rewards.dtype))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (arXiv:1506.02438, eq. 16); returns (advantages, returns), both (B, T).

    ``delta_t = r_t + gamma V(s_{t+1}) - V(s_t)`` and ``A_t = sum_l (gamma lam)^l delta_{t+l}``; the value after the
    last real token is 0. ``returns = advantages + values`` is the critic's target. Tensors are (B, T), the mask True
    on a run of response tokens, 0 comes back elsewhere."""
    advantages = torch.zeros_like(values)
    following = torch.zeros_like(values[:, 0])  # A_{t+1}
    next_value = torch.zeros_like(values[:, 0])  # V(s_{t+1})
    for t in range(values.shape[1] - 1, -1, -1):
        valid = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = torch.where(valid, delta + gamma * lam * following, torch.zeros_like(following))
        next_value = torch.where(valid, values[:, t], torch.zeros_like(next_value))
        advantages[:, t] = following
    return advantages, torch.where(mask, advantages + values, torch.zeros_like(values))
