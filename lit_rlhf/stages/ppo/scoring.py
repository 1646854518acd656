"""The score of an answer in PPO: the reward model, functions of your own, and how the sum is shaped."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_rlhf.arguments import checked
from lit_rlhf.errors import UserError
from lit_rlhf.functional import moments, power_sums, shaped_scores, std_from_moments
from lit_rlhf.models.heads import AnyRewardModel, Critic, CriticFactory
from lit_rlhf.models.reward_head import RewardEnsemble, score_scale
from lit_rlhf.stages.answer_scores import RewardModel, asked, frozen, knows_scale, scores_by, title_of
from lit_rlhf.stages.callables import name_of, resolve
from lit_rlhf.text.packing import Packed
from lit_rlhf.text.records import Messages


@checked
@dataclass(frozen=True)
class Scoring:
    """How answers are scored.

    ``functions`` are called as ``fn(prompts, responses, **record)`` and return a number per answer, or None where they
    have nothing to say of it; nothing is learned from an answer of which nobody says anything. ``prompts`` are
    lists of messages, ``responses`` texts, and ``record`` has a list for each other field of the prompts' records, but
    those of these names, and ``finished``, whether an answer ended by itself. Each is a callable or its name,
    ``"my_module.my_function"``.
    The score of an answer is ``clip(scaled reward model + sum of weight * function) - penalties``; the running scale
    divides the sum."""

    reward_model_weight: Annotated[float, Field(ge=0)] = 1.0  # 0: functions alone
    functions: str | Callable[..., Any] | Sequence[Any] = ()  # or their names, "module.function"
    weights: Sequence[float] | None = None  # one per function; None: 1 each
    scale: Literal["reference", "running", "none"] = "reference"  # whose standard deviation divides
    center: bool = False  # also subtract that mean; False: the mean is not moved
    clip: Annotated[float, Field(gt=0)] | None = None  # largest absolute score; None: no limit
    missing_eos_penalty: Annotated[float, Field(ge=0)] = 1.0  # for an answer that was cut off
    length_penalty: Annotated[float, Field(ge=0)] = 0.0  # per token

    def __post_init__(self) -> None:
        given = [self.functions] if isinstance(self.functions, str) or callable(self.functions) else self.functions
        object.__setattr__(self, "functions", [resolve(f, "ppo.scoring.functions") for f in given])
        weights = [1.0] * len(self.functions) if self.weights is None else list(self.weights)
        if len(weights) != len(self.functions):
            raise UserError(f"weights (ppo.scoring) has {len(weights)} entries for {len(self.functions)} functions")
        object.__setattr__(self, "weights", weights)


class Scorer(nn.Module):
    """Scores answers. The running mean and deviation are buffers, so a resumed run goes on with its own."""

    def __init__(self, reward_model: RewardModel | None, scoring: Scoring) -> None:
        super().__init__()
        if (reward_model is None or scoring.reward_model_weight == 0) and not scoring.functions:
            raise UserError("nothing scores the answers: give a reward model, or functions (ppo.scoring)")
        self.reward_model = frozen(reward_model)
        self.scoring = scoring
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("total", torch.zeros((), dtype=torch.float64))
        self.register_buffer("squares", torch.zeros((), dtype=torch.float64))

    @property
    def _asks_model(self) -> bool:
        return self.reward_model is not None and self.scoring.reward_model_weight > 0

    @property
    def name(self) -> str:
        """The name of what scores: "reward model", "reward function brevity", or all of them."""
        functions = [f"reward function {name_of(f)}" for f in self.scoring.functions]
        return " and ".join([*([title_of(self.reward_model)] if self._asks_model else []), *functions])

    @property
    def token_reader(self) -> AnyRewardModel | None:
        """The reward model, where it reads the policy's tokens."""
        return self.reward_model if isinstance(self.reward_model, AnyRewardModel) else None

    @property
    def may_say_nothing(self) -> bool:
        """Whether an answer may be left without a score."""
        return bool(self.scoring.functions) or self.token_reader is None

    @property
    def unit(self) -> str:
        """The unit of the scores."""
        if self.scoring.scale == "running":
            return "std of all scores"
        alone = self._asks_model and not self.scoring.functions and self.scoring.reward_model_weight == 1
        scaled = alone and self.scoring.scale == "reference" and knows_scale(self.reward_model)
        return "SFT std" if scaled else "reward units"

    def raw(
        self, packed: Sequence[Packed], prompts: list[Messages], responses: list[str], record: dict[str, list[Any]]
    ) -> Tensor:
        """Unscaled scores (N,) of the N responses at the ends of the sequences in the ``packed`` batches.

        NaN: nobody says anything of this one."""
        functions = zip(self.scoring.functions, self.scoring.weights or ())
        said = [(asked(function, prompts, responses, record), weight) for function, weight in functions]
        device = packed[0].tokens.device
        parts = [(torch.tensor([math.nan if x is None else x for x in scores], device=device), w) for scores, w in said]
        if self._asks_model:
            scale = self.scoring.scale == "reference"
            units: dict[str, Any] = {"scale": scale, "center": scale and self.scoring.center, "device": device}
            found = scores_by(self.reward_model, packed, prompts, responses, record, **units)
            parts.insert(0, (found, self.scoring.reward_model_weight))
        scored = torch.stack([~scores.isnan() for scores, _ in parts]).any(0)
        total = sum(weight * scores.nan_to_num() for scores, weight in parts)
        return torch.where(scored, total, math.nan)

    def observe(self, raw: Tensor) -> None:
        """Take a rollout's ``raw`` scores (N,) into the running statistics."""
        for known, new in zip((self.count, self.total, self.squares), power_sums(raw[~raw.isnan()])):
            known.add_(new)

    def shape(self, raw: Tensor, lengths: Tensor, finished: Tensor) -> Tensor:
        """Scores (N,) from the ``raw`` ones, for answers of ``lengths`` (N,) tokens, ``finished`` (N,) or cut off.

        NaN stays NaN: penalties alone are no score."""
        settings = self.scoring
        penalties = settings.missing_eos_penalty, settings.length_penalty
        return shaped_scores(self._scaled(raw), lengths, finished, settings.clip, *penalties)

    def _scaled(self, raw: Tensor) -> Tensor:
        """By the running scale, where that is the one."""
        if self.scoring.scale != "running":
            return raw
        mean, square = moments(torch.stack([self.count, self.total, self.squares]))
        return ((raw - mean if self.scoring.center else raw) / std_from_moments(mean, square)).float()


def critic_in_units(
    make: CriticFactory, policy: PreTrainedModel, reward_model: RewardModel | None, scoring: Scoring
) -> Any:
    """Make the critic. One that starts as the reward model is rescaled to the units that ``scoring`` gives its scores.

    A running scale is not known yet and is left out."""
    critic = make(policy, reward_model)
    if isinstance(critic, Critic) and isinstance(reward_model, AnyRewardModel) and scoring.reward_model_weight > 0:
        reference = scoring.scale == "reference"
        units = score_scale(reward_model)
        mean = units.mean / units.std if reference and scoring.center else 0.0
        # The members of an ensemble are scaled whatever the settings say.
        critic.in_units(scoring.reward_model_weight, reference or isinstance(reward_model, RewardEnsemble), mean)
    return critic
