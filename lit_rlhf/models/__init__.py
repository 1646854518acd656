"""Neural networks: loading, heads, sampling, model folders."""

from lit_rlhf.models.checkpoint import fingerprint, save_model
from lit_rlhf.models.generation import Responses, Sampling, answer, generate
from lit_rlhf.models.heads import (
    last_scores,
    load_reward_model,
    packed_scores,
    packed_values,
    reward_model_from_config,
    score_shift,
    score_std,
)
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
    "Responses",
    "Sampling",
    "answer",
    "context_length",
    "fingerprint",
    "freeze",
    "generate",
    "last_scores",
    "load_policy",
    "load_policy_and_tokenizer",
    "load_reward_model",
    "next_token_logits",
    "packed_hidden",
    "packed_scores",
    "packed_values",
    "policy_from_config",
    "response_positions",
    "reward_model_from_config",
    "save_model",
    "score_shift",
    "score_std",
]
