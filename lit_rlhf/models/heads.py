"""Scores from a Transformer: the reward model and the critic.

Both are a bias-free linear head on the last hidden state. The reward model, one of Hugging Face's sequence classifiers
with one label, reads it at the last token, the critic at every token."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.errors import UserError
from lit_rlhf.models.lora import LoRA, add_lora, merged
from lit_rlhf.models.policy import load_pretrained, match_tokenizer, packed_hidden, policy_from_config
from lit_rlhf.text.packing import Packed


def load_reward_model(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str = "float32",
    new_head: bool = False,
    lora: LoRA | None = None,
) -> PreTrainedModel:
    """Load a reward model, with adapters where ``lora`` asks for them.

    With ``new_head`` a language model will do, too: its trunk gets a scalar head that scores everything 0. Without it,
    a folder that holds no head raises ``UserError``: its scores would mean nothing."""
    model, loading = load_pretrained(
        AutoModelForSequenceClassification, path, num_labels=1, dtype=getattr(torch, dtype), output_loading_info=True
    )
    if any(name.startswith("score.") for name in loading["missing_keys"]):
        if not new_head:
            raise UserError(
                f"{path}: a language model, where a reward model was expected (it has no scalar head); train one "
                "from it with stage=reward"
            )
        nn.init.zeros_(score_head(model).weight)
    if tokenizer is not None:
        match_tokenizer(model, tokenizer, str(path))
    return add_lora(model, lora)


def reward_model_from_config(config: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A freshly initialized reward model that scores everything 0; ``config`` as in ``policy_from_config``."""
    architecture = policy_from_config(config, tokenizer).config
    architecture.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(architecture)
    nn.init.zeros_(score_head(model).weight)
    return model


def score_head(model: PreTrainedModel) -> nn.Linear:
    """The linear head (labels, D) of a sequence classifier."""
    return model.score


def packed_scores(model: PreTrainedModel, batch: Packed) -> Tensor:
    """The scalar (N,) at the last token of each packed sequence: the score before it is shifted."""
    return last_scores(model, packed_hidden(model, batch), batch)


def last_scores(model: PreTrainedModel, hidden: Tensor, batch: Packed) -> Tensor:
    """The same from hidden states (R * L, D) that are there already."""
    return score_head(model)(hidden[batch.ends.to(hidden.device)]).squeeze(-1)


def score_shift(model: PreTrainedModel) -> float:
    """What is added to the raw score so that demonstrations average 0; 0 for a model that does not say."""
    return float(getattr(model.config, "score_shift", 0.0))


def score_std(model: PreTrainedModel) -> float:
    """Standard deviation of the scores of sampled answers; 1 for a model that does not say."""
    return float(getattr(model.config, "score_std", 1.0))


def score_mean(model: PreTrainedModel) -> float:
    """Mean of the shifted scores of sampled answers; 0 for a model that does not say."""
    return float(getattr(model.config, "score_mean", 0.0))


def sequence_classifier(policy: PreTrainedModel, head: nn.Linear, labels: Sequence[str]) -> PreTrainedModel:
    """``policy``'s trunk (adapters merged) and ``head``, bias-free, as one of Hugging Face's sequence classifiers.

    It reads the head at the last token that is not padding. ``labels`` name the head's outputs."""
    trunk = merged(policy)
    config = copy.deepcopy(trunk.config)
    config.num_labels = head.out_features
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
    config.problem_type = "single_label_classification" if head.out_features > 1 else None
    model = AutoModelForSequenceClassification.from_config(config, dtype=trunk.dtype)
    model.base_model.load_state_dict(trunk.base_model.state_dict())
    score_head(model).load_state_dict(head.state_dict())
    return model


class Critic(nn.Module):
    """The value of the state before each next token: a linear head on a trunk of its own, or on the policy's."""

    def __init__(self, trunk: PreTrainedModel | None, head: nn.Linear) -> None:
        super().__init__()
        self.trunk, self.head = trunk, head

    def forward(self, packed: Packed, policy_hidden: Tensor) -> Tensor:
        """Values (R * L,) at every token of packed rows; ``policy_hidden`` (R * L, D) serves a shared trunk."""
        hidden = policy_hidden if self.trunk is None else packed_hidden(self.trunk, packed)
        return self.head(hidden).squeeze(-1).float()


CriticFactory = Callable[[PreTrainedModel, "PreTrainedModel | None"], Critic]


def critic_from_reward_model(
    policy: PreTrainedModel, reward_model: PreTrainedModel | None, lora: LoRA | None = None
) -> Critic:
    """A critic that begins as the reward model (InstructGPT, appendix C.4); ``lora`` gives it adapters."""
    if reward_model is None:
        raise UserError(
            "ppo/critic=reward_model needs a reward model, and there is none; take ppo/critic=policy or "
            "ppo/critic=shared"
        )
    critic = copy.deepcopy(reward_model).requires_grad_(True)
    add_lora(critic, lora)
    return Critic(critic.base_model, score_head(critic))


def critic_from_policy(
    policy: PreTrainedModel, reward_model: PreTrainedModel | None = None, lora: LoRA | None = None
) -> Critic:
    """A critic that begins as the policy, with a head that values everything 0."""
    trunk = copy.deepcopy(merged(policy)).requires_grad_(True)
    add_lora(trunk, lora)
    return Critic(trunk.base_model, _zero_head(policy))


def critic_on_policy(policy: PreTrainedModel, reward_model: PreTrainedModel | None = None) -> Critic:
    """A value head on the policy's own trunk: no second model, and both losses shape the one there is."""
    return Critic(None, _zero_head(policy))


def _zero_head(policy: PreTrainedModel) -> nn.Linear:
    head = nn.Linear(policy.get_input_embeddings().embedding_dim, 1, bias=False)
    nn.init.zeros_(head.weight)
    return head.to(policy.device, policy.dtype)
