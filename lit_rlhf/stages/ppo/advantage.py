"""How an answer's rewards become advantages: the choices of ``ppo/advantage``.

Any callable ``(rewards, values, mask, answers_per_prompt) -> (advantages, returns)`` will do, a function in a notebook
too: tensors are (N, T), or (N, 1) where the whole answer is one action; ``returns`` is the critic's target, or None.
The mask is False all along an answer that nobody has scored: it belongs in no baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Protocol

from pydantic import Field
from torch import Tensor

from lit_rlhf.arguments import checked
from lit_rlhf.functional import Baseline, gae, monte_carlo


class AdvantageEstimator(Protocol):
    """Protocol of what :class:`PPOModule` asks for advantages.

    Two attributes may say more: ``needs_critic`` (True without it), and ``compares_answers``, whether it needs at least
    two answers per prompt (False without it)."""

    def __call__(
        self, rewards: Tensor, values: Tensor, mask: Tensor, answers_per_prompt: int
    ) -> tuple[Tensor, Tensor | None]:
        """(advantages, returns)"""
        ...


@checked
@dataclass(frozen=True)
class GAE:
    """Generalized advantage estimation with a critic: one-step TD at ``lam`` 0, Monte-Carlo targets at ``lam`` 1."""

    needs_critic: ClassVar[bool] = True
    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0  # discount of a token
    lam: Annotated[float, Field(ge=0, le=1)] = 0.95

    def __call__(
        self, rewards: Tensor, values: Tensor, mask: Tensor, answers_per_prompt: int = 1
    ) -> tuple[Tensor, Tensor]:
        return gae(rewards, values, mask, self.gamma, self.lam)


@checked
@dataclass(frozen=True)
class MonteCarlo:
    """Rewards to go, less a baseline from other answers: REINFORCE, RLOO, and with ``divide_by_std`` GRPO."""

    needs_critic: ClassVar[bool] = False
    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0  # discount of a token
    baseline: Baseline = "none"
    divide_by_std: bool = False  # of the answers to the same prompt

    @property
    def compares_answers(self) -> bool:
        """Whether several answers per prompt are needed."""
        return self.baseline in ("prompt", "others") or self.divide_by_std

    def __call__(
        self, rewards: Tensor, values: Tensor, mask: Tensor, answers_per_prompt: int = 1
    ) -> tuple[Tensor, None]:
        settings = self.gamma, self.baseline, answers_per_prompt, self.divide_by_std
        return monte_carlo(rewards, mask, *settings), None
