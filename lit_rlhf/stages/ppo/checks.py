"""Checks of PPO's settings against its models, before training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel

from lit_rlhf.errors import UserError
from lit_rlhf.models.heads import AnyRewardModel
from lit_rlhf.rollouts import Sampling
from lit_rlhf.stages.answer_scores import RewardModel


def check(
    policy: PreTrainedModel,
    reward_model: RewardModel | None,
    advantage: Callable[..., Any],
    answers_per_prompt: int,
    sampling: Sampling,
) -> None:
    """Raise ``UserError`` where PPO could not learn from what these settings make."""
    if isinstance(reward_model, AnyRewardModel):  # others read text
        ours, theirs = (len(m.get_input_embeddings().weight) for m in (policy, reward_model))
        if ours != theirs:
            raise UserError(
                f"the policy has a vocabulary of {ours} tokens and the reward model one of {theirs}, so it would read "
                "other words than were written; train the reward model from the same SFT model (stage=reward)"
            )
    if getattr(advantage, "compares_answers", False) and answers_per_prompt < 2:
        raise UserError(
            "answers_per_prompt=1 (ppo.module): this advantage (RLOO, GRPO, a mean over the prompt) compares the "
            "answers to a prompt with each other: give 2 or more, 4 say"
        )
    if sampling.temperature == 0:
        raise UserError("sampling.temperature=0 (ppo.module): PPO learns from samples; give it a value above 0")
    if sampling.top_k or sampling.top_p < 1:
        raise UserError(
            "sampling (ppo.module): top_k and top_p must be 0 and 1: what is cut off could not be drawn, so "
            "the samples would not be those of the policy that learns from them"
        )
    if sampling.min_new_tokens:
        raise UserError(
            "sampling (ppo.module): min_new_tokens must be 0: an end that could not be drawn is one that the policy "
            "never learns from; short answers are held off by scoring (ppo.scoring)"
        )
