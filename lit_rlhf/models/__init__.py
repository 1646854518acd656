"""Neural networks: loading, heads, sampling, model folders."""

from lit_rlhf.models.checkpoint import fingerprint, save_model
from lit_rlhf.models.generation import Responses, Sampling, answer, generate
from lit_rlhf.models.heads import (
    Critic,
    CriticFactory,
    critic_from_policy,
    critic_from_reward_model,
    critic_on_policy,
    last_scores,
    load_reward_model,
    packed_scores,
    reward_model_from_config,
    score_mean,
    score_shift,
    score_std,
)
from lit_rlhf.models.lora import LoRA, adapters_off, add_lora, lora_layers, merged
from lit_rlhf.models.policy import (
    context_length,
    freeze,
    load_policy,
    load_policy_and_tokenizer,
    next_token_logits,
    packed_hidden,
    policy_from_config,
    response_positions,
)

__all__ = [
    "Critic",
    "CriticFactory",
    "LoRA",
    "Responses",
    "Sampling",
    "adapters_off",
    "add_lora",
    "answer",
    "context_length",
    "critic_from_policy",
    "critic_from_reward_model",
    "critic_on_policy",
    "fingerprint",
    "freeze",
    "generate",
    "last_scores",
    "load_policy",
    "load_policy_and_tokenizer",
    "load_reward_model",
    "lora_layers",
    "merged",
    "next_token_logits",
    "packed_hidden",
    "packed_scores",
    "policy_from_config",
    "response_positions",
    "reward_model_from_config",
    "save_model",
    "score_mean",
    "score_shift",
    "score_std",
]
