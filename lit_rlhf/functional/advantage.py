"""From scores to rewards, and from rewards to advantages: the rungs of the policy-gradient ladder."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lit_rlhf.functional.masking import check_choice, check_shapes, last_position, masked_mean, masked_sum

Baseline = Literal["none", "batch", "prompt", "others"]


def token_rewards(scores: Tensor, penalties: Tensor, mask: Tensor) -> Tensor:
    """Rewards (B, T): a penalty on every token and the score on the last real one (InstructGPT, eq. 2).

    ``r_t = -penalty_t + [t last] score``. ``scores`` (B,); ``penalties`` (B, T) in reward units, ``kl_coef`` times an
    estimate of the KL divergence, say; mask True = response token; 0 elsewhere.

    >>> mask = torch.tensor([[True, True, False]])
    >>> token_rewards(torch.tensor([2.0]), torch.tensor([[0.5, 0.25, 9.0]]), mask)
    tensor([[-0.5000,  1.7500,  0.0000]])
    """
    check_shapes(penalties=penalties, mask=mask)
    check_shapes(**{"scores": scores, "rows of penalties": penalties[:, 0]})
    rewards = torch.where(mask, -penalties, torch.zeros_like(penalties))
    last = last_position(mask)
    return rewards.scatter_add(1, last[:, None], scores[:, None].to(rewards.dtype))


def whole_answer(x: Tensor, mask: Tensor) -> Tensor:
    """Sums over an answer, (B, T) to (B, 1): log-probs and rewards where the whole answer is one action.

    >>> whole_answer(torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[True, True, False]]))
    tensor([[3.]])
    """
    check_shapes(x=x, mask=mask)
    return masked_sum(x, mask, dim=-1)[:, None]


def reward_to_go(rewards: Tensor, mask: Tensor, gamma: float = 1.0) -> Tensor:
    """``G_t = sum_l gamma^l r_{t+l}`` (B, T), the discounted rewards from each token on (REINFORCE, Williams 1992).

    Mask True on response tokens, wherever they stand: what lies between two of them takes no time. 0 comes back
    elsewhere.

    >>> reward_to_go(torch.tensor([[1.0, 5.0, 2.0]]), torch.tensor([[True, False, True]]), gamma=0.5)
    tensor([[2., 0., 2.]])
    """
    check_shapes(rewards=rewards, mask=mask)
    returns = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    for t in range(rewards.shape[1] - 1, -1, -1):
        following = torch.where(mask[:, t], rewards[:, t] + gamma * following, following)
        returns[:, t] = following
    return torch.where(mask, returns, torch.zeros_like(returns))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (arXiv:1506.02438, eq. 16); returns (advantages, returns), both (B, T).

    ``delta_t = r_t + gamma V(s_{t+1}) - V(s_t)`` and ``A_t = sum_l (gamma lam)^l delta_{t+l}``; the value after the
    last real token is 0. ``lam`` 1 is the actor-critic with Monte-Carlo targets, ``lam`` 0 the one with one-step TD.
    ``returns = advantages + values`` is the critic's target. Tensors are (B, T), the mask True on response tokens,
    wherever they stand: in a dialogue the next action of a turn's last token is the next turn's first. 0 comes back
    elsewhere.

    >>> rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.25]])  # deltas are -0.25 and 0.75
    >>> gae(rewards, values, torch.ones(1, 2, dtype=torch.bool), gamma=1.0, lam=0.5)
    (tensor([[0.1250, 0.7500]]), tensor([[0.6250, 1.0000]]))
    """
    check_shapes(rewards=rewards, values=values, mask=mask)
    advantages = torch.zeros_like(values)
    following = torch.zeros_like(values[:, 0])  # A_{t+1}
    next_value = torch.zeros_like(values[:, 0])  # V(s_{t+1})
    for t in range(values.shape[1] - 1, -1, -1):
        valid = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = torch.where(valid, delta + gamma * lam * following, following)
        next_value = torch.where(valid, values[:, t], next_value)
        advantages[:, t] = following
    zero = torch.zeros_like(values)
    return torch.where(mask, advantages, zero), torch.where(mask, advantages + values, zero)


def baseline(returns: Tensor, kind: Baseline, answers_per_prompt: int = 1, mask: Tensor | None = None) -> Tensor:
    """What each answer is compared with, (B,), from the ``returns`` (B,) of a batch.

    "none": 0. "batch": the mean of all answers. "prompt": the mean of the ``answers_per_prompt`` (K) answers to
    the same prompt, which stand next to each other. "others": the mean of the K - 1 other ones, which leaves the
    gradient unbiased (RLOO, arXiv:2402.14740; Kool et al. 2019). The two in between contain the answer itself and
    shrink the gradient by 1 - 1/n. ``mask`` (B,) is False for answers that nobody has scored: they are in no mean, and
    K is then the number of the scored ones; what comes back for them, and from "others" for an answer that is the only
    scored one, says nothing. Raises ``ValueError`` where K is too small or does not divide B.

    >>> baseline(torch.tensor([1.0, 5.0, 9.0]), "others", 3, mask=torch.tensor([True, True, False]))[:2]
    tensor([5., 1.])
    """
    check_choice("kind", kind, get_args(Baseline))
    mask = torch.ones_like(returns, dtype=torch.bool) if mask is None else mask
    if kind == "none":
        return torch.zeros_like(returns)
    if kind == "batch":
        return masked_mean(returns, mask).expand_as(returns)
    groups, counted = (_groups(x, answers_per_prompt) for x in (returns, mask))
    total, k = masked_sum(groups, counted, dim=1)[:, None], counted.sum(1, keepdim=True)
    if kind == "prompt":
        return (total / k.clamp(min=1)).expand_as(groups).reshape(-1)
    return ((total - groups) / (k - 1).clamp(min=1)).reshape(-1)


def group_std(returns: Tensor, answers_per_prompt: int, mask: Tensor | None = None) -> Tensor:
    """Standard deviation (B,) of the ``returns`` (B,) of the K answers to the same prompt, divided by K - 1.

    ``mask`` (B,) is False for answers that nobody has scored, as in :func:`baseline`.

    GRPO (arXiv:2402.03300, section 4.1) divides by it, which lifts prompts whose answers hardly differ: the optimum is
    then another one than that of the KL-regularized objective.

    >>> group_std(torch.tensor([1.0, 3.0, 5.0, 7.0, 7.0, 7.0]), answers_per_prompt=3)
    tensor([2., 2., 2., 0., 0., 0.])
    """
    mask = torch.ones_like(returns, dtype=torch.bool) if mask is None else mask
    groups, counted = (_groups(x, answers_per_prompt) for x in (returns, mask))
    squares = (groups - masked_mean(groups, counted, dim=1)[:, None]) ** 2
    variance = masked_sum(squares, counted, dim=1) / (counted.sum(1) - 1).clamp(min=1)
    return variance.sqrt()[:, None].expand_as(groups).reshape(-1)


def monte_carlo(
    rewards: Tensor,
    mask: Tensor,
    gamma: float = 1.0,
    kind: Baseline = "none",
    answers_per_prompt: int = 1,
    divide_by_std: bool = False,
) -> Tensor:
    """Advantages (B, T): rewards to go less a baseline, ``A_t = G_t - b`` of each answer, without a critic.

    REINFORCE with the baseline ``kind`` "none", RLOO with "others", GRPO (arXiv:2402.03300, section 4.1) with "prompt"
    and ``divide_by_std``: divided by 1e-4 plus :func:`group_std`. The baseline is one of the answers' whole returns;
    arguments as in :func:`reward_to_go` and :func:`baseline`. A row without a True in the mask is in no baseline.

    >>> mask = torch.ones(2, 2, dtype=torch.bool)
    >>> monte_carlo(torch.tensor([[0.0, 1.0], [-1.0, 4.0]]), mask, kind="others", answers_per_prompt=2)
    tensor([[-2., -2.],
            [ 2.,  3.]])
    """
    returns = reward_to_go(rewards, mask, gamma)
    first = mask.int().argmax(-1, keepdim=True)  # token of each answer
    totals, scored = returns.gather(1, first).squeeze(1), mask.any(-1)
    advantages = returns - baseline(totals, kind, answers_per_prompt, scored)[:, None]
    if divide_by_std:
        advantages = advantages / (group_std(totals, answers_per_prompt, scored)[:, None] + 1e-4)
    return torch.where(mask, advantages, 0.0)


def _groups(returns: Tensor, k: int) -> Tensor:
    if k < 2 or returns.shape[0] % k:
        raise ValueError(
            f"{returns.shape[0]} answers, {k} per prompt: comparing answers to a prompt takes two or more of each"
        )
    return returns.view(-1, k)
