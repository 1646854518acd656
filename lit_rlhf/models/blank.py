"""Models without weights, on torch's ``meta`` device: as large as wanted, and taking no memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lit_rlhf.models.heads import AnyRewardModel
from lit_rlhf.models.loading import MODEL_TYPE, load_config, match_tokenizer
from lit_rlhf.models.lora import LoRA, add_lora, base_path
from lit_rlhf.models.policy import policy_from_config
from lit_rlhf.models.reward_head import RewardHead, RewardTransformer
from lit_rlhf.text.model_folder import model_settings

Architecture = PretrainedConfig | dict[str, Any]  # a dict as ``policy_from_config`` takes it


def architecture_of(path: str | Path) -> PretrainedConfig:
    """The architecture of the model in a folder or on the Hub; of a reward model of ours, its trunk's."""
    path = base_path(path)
    settings = model_settings(path)
    if settings.get("model_type") == MODEL_TYPE:
        return AutoConfig.for_model(**settings["trunk"])
    return load_config(path)


def blank_policy(
    architecture: Architecture, tokenizer: PreTrainedTokenizerBase, lora: LoRA | None = None
) -> PreTrainedModel:
    """A causal language model without weights, with as many embeddings as the tokenizer has tokens."""
    with torch.device("meta"):
        if isinstance(architecture, dict):
            model = policy_from_config(architecture, tokenizer)
        else:
            model = AutoModelForCausalLM.from_config(architecture, dtype=torch.float32)
            match_tokenizer(model, tokenizer, "the model")
        return add_lora(model, lora)


def blank_reward_model(
    architecture: Architecture,
    tokenizer: PreTrainedTokenizerBase,
    head: RewardHead | None = None,
    lora: LoRA | None = None,
) -> AnyRewardModel:
    """A reward model without weights; ``architecture`` is that of its trunk."""
    with torch.device("meta"):
        policy = blank_policy(architecture, tokenizer)
        if not (head or RewardHead()).is_classifier(policy.config):
            return add_lora(RewardTransformer.from_policy(policy, head or RewardHead()), lora)
        policy.config.num_labels = 1
        model = AutoModelForSequenceClassification.from_config(policy.config, dtype=torch.float32)
        return add_lora(model, lora)
