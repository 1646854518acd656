"""The policy's loss: the choices of ``ppo/loss``.

Any callable ``(logprobs, old_logprobs, advantages, mask) -> loss`` will do; those without settings are functions of
:mod:`lit_rlhf.functional`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from lit_rlhf.arguments import checked
from lit_rlhf.functional import adapted_beta, clipped_policy_loss, kl_penalty_loss

PolicyLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@checked
@dataclass(frozen=True)
class ClippedLoss:
    """PPO's clipped surrogate (arXiv:1707.06347, eq. 7)."""

    clip_range: Annotated[float, Field(gt=0)] = 0.2  # of the probability ratio

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return clipped_policy_loss(logprobs, old_logprobs, advantages, mask, self.clip_range)


@checked
class KLPenaltyLoss(nn.Module):
    """PPO with an adaptive penalty for leaving the policy that sampled (arXiv:1707.06347, eq. 8).

    Args:
        beta: its first coefficient, in reward units per nat; a buffer, so that a resumed run goes on with its own.
        target: nats per token that one rollout's updates should move the policy; None keeps ``beta``.
    """

    def __init__(
        self, beta: Annotated[float, Field(ge=0)] = 1.0, target: Annotated[float, Field(gt=0)] | None = 0.01
    ) -> None:
        super().__init__()
        self.target = target
        self.register_buffer("beta", torch.tensor(float(beta)))

    def forward(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return kl_penalty_loss(logprobs, old_logprobs, advantages, mask, self.beta)

    def adapt(self, kl: float) -> None:
        """Adapt the penalty after a rollout's updates, which moved the policy by ``kl`` nats per token."""
        if self.target is not None:
            self.beta.fill_(adapted_beta(self.beta.item(), kl, self.target))
