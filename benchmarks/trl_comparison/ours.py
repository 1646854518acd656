"""Our side of a comparison with TRL's PPO: our module with the settings that both have."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.stages.ppo import GAE, ClippedLoss, PPODataModule, PPOModule, Scoring
from lit_rlhf.stages.prompts import Prompt
from lit_rlhf.training import warmup_decay

KL_COEF, CLIP, VALUE_CLIP, VALUE_COEF, GAMMA, LAM, MISSING_EOS = 0.05, 0.2, 0.2, 0.1, 1.0, 0.95, 1.0
ADAM_BETAS = 0.9, 0.95


def ppo_module(
    policy: PreTrainedModel, reward_model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *,
    kind: type[PPOModule] = PPOModule, **settings: Any,
) -> PPOModule:  # fmt: skip
    """Our module with what ``task.trl_trainer`` sets on the other side; ``settings`` are the module's."""
    return kind(
        policy, reward_model, tokenizer, advantage=GAE(GAMMA, LAM), loss=ClippedLoss(CLIP), kl_coef=KL_COEF,
        scoring=Scoring(missing_eos_penalty=MISSING_EOS), value_clip_range=VALUE_CLIP,
        schedule=partial(warmup_decay, shape="constant", warmup=0.0), value_coef=VALUE_COEF,
        max_grad_norm=1e9, **settings,  # TRL clips no gradients
    )  # fmt: skip


def prompt_data(
    prompts: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase, batch_size: int, seed: int = 0
) -> PPODataModule:
    """Token lists as the prompts of our module."""
    data = PPODataModule("", tokenizer, batch_size=batch_size, seed=seed)
    data.train_prompts = [Prompt([], tokens, kind="", held_out=False, record={}) for tokens in prompts]
    data.held_out_prompts = data.train_prompts[:1]  # nothing is validated; with none, a file would be read
    return data
