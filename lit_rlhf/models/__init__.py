"""Neural networks: loading, heads, log-probs, the reference, model folders."""

from lit_rlhf.models.adapters import adapters_off, effective_weight, lora_layers, merged, plain_weights
from lit_rlhf.models.attention import use_own_attention
from lit_rlhf.models.checkpoint import fingerprint, save_model
from lit_rlhf.models.chunked import adds_to_gradients, by_token, token_logprobs_of
from lit_rlhf.models.fused import fuse
from lit_rlhf.models.heads import (
    Critic,
    CriticFactory,
    critic_from_policy,
    critic_from_reward_model,
    critic_on_policy,
    head_parameters,
    kept_language_model,
    load_reward_model,
    packed_scores,
    reward_model_from_config,
    score_answers,
    score_mean,
    score_shift,
    score_std,
    scores_and_hidden,
    scores_of,
    sequence_classifier,
)
from lit_rlhf.models.logits import next_token_logits
from lit_rlhf.models.lora import LoRA, add_lora, learning, save_adapter, starts_unchanged, train_adapters
from lit_rlhf.models.micro_batches import tokens_at_once
from lit_rlhf.models.onednn import use_onednn
from lit_rlhf.models.policy import (
    context_length,
    end_tokens,
    freeze,
    layers,
    load_policy,
    load_policy_and_tokenizer,
    packed_hidden,
    policy_from_config,
    predicting_positions,
    response_positions,
    shares_prompts,
)
from lit_rlhf.models.reference import Reference, ReferenceUpdate
from lit_rlhf.models.responses import Responding, response_logprobs, scatter, stacked
from lit_rlhf.models.reward_head import RewardEnsemble, RewardHead, RewardTransformer, ScoreHead
from lit_rlhf.models.text_rows import TextRows, check_rows, text_loss

__all__ = [
    "Critic",
    "CriticFactory",
    "LoRA",
    "Reference",
    "ReferenceUpdate",
    "Responding",
    "RewardEnsemble",
    "RewardHead",
    "RewardTransformer",
    "ScoreHead",
    "TextRows",
    "adapters_off",
    "add_lora",
    "adds_to_gradients",
    "by_token",
    "check_rows",
    "context_length",
    "critic_from_policy",
    "critic_from_reward_model",
    "critic_on_policy",
    "effective_weight",
    "end_tokens",
    "fingerprint",
    "freeze",
    "fuse",
    "head_parameters",
    "kept_language_model",
    "layers",
    "learning",
    "load_policy",
    "load_policy_and_tokenizer",
    "load_reward_model",
    "lora_layers",
    "merged",
    "next_token_logits",
    "packed_hidden",
    "packed_scores",
    "plain_weights",
    "policy_from_config",
    "predicting_positions",
    "response_logprobs",
    "response_positions",
    "reward_model_from_config",
    "save_adapter",
    "save_model",
    "scatter",
    "score_answers",
    "score_mean",
    "score_shift",
    "score_std",
    "scores_and_hidden",
    "scores_of",
    "sequence_classifier",
    "shares_prompts",
    "stacked",
    "starts_unchanged",
    "text_loss",
    "token_logprobs_of",
    "tokens_at_once",
    "train_adapters",
    "use_onednn",
    "use_own_attention",
]
