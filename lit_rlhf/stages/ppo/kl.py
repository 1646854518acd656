"""KL penalty: its settings, and what is measured of next-token distributions for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from lit_rlhf.arguments import checked
from lit_rlhf.errors import UserError
from lit_rlhf.functional import Estimator, full_kl, token_entropy, token_logprobs
from lit_rlhf.models.logits import next_token_logits
from lit_rlhf.models.reference import Reference


@checked
@dataclass(frozen=True)
class KLPenalty:
    """The penalty for leaving the reference; its coefficient is ``ppo.module.kl_coef``."""

    estimator: Estimator = "k1"  # k1, k2, k3, or full: over the whole vocabulary
    in_loss: bool = False  # False: taken from the rewards, token by token; True: added to the loss
    adaptive: bool = False  # move the coefficient until the divergence is at the target
    target: Annotated[float, Field(gt=0)] | None = None  # nats per answer
    horizon: Annotated[float, Field(gt=0)] = 1000.0  # episodes; the shorter, the faster the coefficient moves
    stop: Annotated[float, Field(gt=0)] | None = None  # nats per token; a rollout's updates end beyond it
    budget: Annotated[float, Field(gt=0)] | None = None  # nats per answer; training ends where a rollout reaches it

    def __post_init__(self) -> None:
        if self.in_loss and self.estimator == "k1":
            raise UserError(
                "estimator='k1' with in_loss=True (ppo.kl): the gradient of k1 is 0 in expectation, so it would hold "
                "nothing back; take k2 (the gradient of KL(policy || reference)), full, or in_loss=False"
            )
        if self.adaptive and self.target is None:
            raise UserError("adaptive=True (ppo.kl) needs target, in nats per answer (6 is a common value)")


def logprob_and_entropy(temperature: float, logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-prob and entropy (M, 2), nats, of ``tokens`` (M,) from the policy's ``logits`` (M, V)."""
    tempered = _tempered(logits, temperature)
    return torch.stack([token_logprobs(tempered, tokens), token_entropy(tempered)], dim=-1)


def logprob_and_kl(
    policy: PreTrainedModel,
    reference: Reference,
    temperature: float,
    logits: Tensor,
    tokens: Tensor,
    ref_hidden: Tensor,
) -> Tensor:
    """Log-prob and KL (M, 2), nats, of ``tokens`` (M,): policy's ``logits`` (M, V), reference's hidden states (M, D).

    The divergence is over all tokens."""
    with torch.no_grad(), reference.for_penalty(policy) as model:
        ref_logits = _tempered(next_token_logits(model, ref_hidden), temperature).float()
    tempered = _tempered(logits, temperature)
    return torch.stack([token_logprobs(tempered, tokens), full_kl(tempered.float(), ref_logits)], dim=-1)


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    """Divided by the temperature that was sampled with, in the reference too: both are then distributions over what
    could have been drawn."""
    return logits if temperature == 1 else logits / temperature
