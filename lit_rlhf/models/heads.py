"""Scores from a Transformer: the reward model and the critic.

Both are Hugging Face's sequence classifiers with one label: a bias-free linear head on the last hidden state. The
reward model reads it at the last token, the critic at every token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.errors import UserError
from lit_rlhf.models.policy import load_pretrained, match_tokenizer, packed_hidden, policy_from_config
from lit_rlhf.text.packing import Packed


def load_reward_model(
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str = "float32",
    new_head: bool = False,
) -> PreTrainedModel:
    """Load a reward model.

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
    return model


def reward_model_from_config(config: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A freshly initialized reward model that scores everything 0; ``config`` as in ``policy_from_config``."""
    architecture = policy_from_config(config, tokenizer).config
    architecture.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(architecture)
    nn.init.zeros_(score_head(model).weight)
    return model


def score_head(model: PreTrainedModel) -> nn.Linear:
    """The linear head (1, D) of a one-label sequence classifier."""
    return model.score


def packed_values(model: PreTrainedModel, batch: Packed) -> Tensor:
    """A scalar (R * L,) at every token of packed rows."""
    return score_head(model)(packed_hidden(model, batch)).squeeze(-1)


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
