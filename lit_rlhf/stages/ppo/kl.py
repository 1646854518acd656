"""KL penalty settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from lit_rlhf.errors import UserError
from lit_rlhf.functional import Estimator


@dataclass(frozen=True)
class KLPenalty:
    """The penalty for leaving the reference; its coefficient is ``ppo.module.kl_coef``."""

    estimator: Estimator = "k1"  # k1, k2, k3, or full: over the whole vocabulary
    in_loss: bool = False  # False: taken from the rewards, token by token; True: added to the loss
    adaptive: bool = False  # move the coefficient until the divergence is at the target
    target: Annotated[float, Field(gt=0)] | None = None  # nats an answer
    horizon: Annotated[float, Field(gt=0)] = 1000.0  # episodes; the shorter, the faster the coefficient moves
    stop: Annotated[float, Field(gt=0)] | None = None  # nats a token; a rollout's updates end beyond it

    def __post_init__(self) -> None:
        if self.in_loss and self.estimator == "k1":
            raise UserError(
                "ppo.kl.estimator=k1 with ppo.kl.in_loss=true: the gradient of k1 is 0 in expectation, so it would "
                "hold nothing back; take k2 (the gradient of KL(policy || reference)), full, or in_loss=false"
            )
        if self.adaptive and self.target is None:
            raise UserError("ppo.kl.adaptive=true needs ppo.kl.target, in nats an answer (6 is a common value)")
