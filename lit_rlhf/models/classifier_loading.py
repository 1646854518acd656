"""Sequence classifiers of transformers as reward models: all of their weights, as they are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from lit_rlhf.errors import UserError
from lit_rlhf.models.loading import (
    Dtype,
    check_loaded,
    classifier_name,
    format_of,
    is_classifier,
    load_config,
    read_config,
    read_pretrained,
    weight_files,
)

BIAS = "score.bias"  # of a linear head that transformers makes without one


def load_classifier(
    path: str | Path, dtype: Dtype, new_head: bool, export_dtype: Dtype | None = None, **settings: Any
) -> tuple[PreTrainedModel, bool]:
    """(A reward model, which is a sequence classifier with one label, whether its head is new and random).

    Errors are those of :func:`load_language_model`. With ``new_head`` a language model will do: its own head is
    dropped."""
    config = load_config(path)
    if config.architectures and is_classifier(config) and config.num_labels != 1:
        raise UserError(f"{path}: {classifier_name(config)}, where a reward model was expected, which has one label")
    no_head = UserError(
        f"{path}: a language model, where a reward model was expected (it has no scalar head); train one from it with "
        "stage=reward"
    )
    if config.model_type not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        raise no_head
    model, loading = read_pretrained(AutoModelForSequenceClassification, path, dtype, num_labels=1, **settings)
    fresh = {name for name in loading["missing_keys"] if name.startswith("score.")}
    if fresh and not new_head:
        raise no_head
    loading["missing_keys"] -= fresh
    if loading["unexpected_keys"]:
        loading["unexpected_keys"] -= _language_head(config)
    return check_loaded(_with_bias(model, path, loading), path, loading, export_dtype), bool(fresh)


def load_any_classifier(path: str | Path, dtype: Dtype) -> PreTrainedModel:
    """A sequence classifier of any family, with any number of labels. Errors are those of :func:`load_classifier`."""
    config = read_config(path)
    if not is_classifier(config):
        return load_classifier(path, dtype, new_head=False)[0]  # which says what it is
    model, loading = read_pretrained(AutoModelForSequenceClassification, path, dtype)
    return check_loaded(_with_bias(model, path, loading), path, loading, None)


def reads_as_ours(path: str | Path) -> bool:
    """Whether a classifier can be read as ours are: one label, from a linear head on the last state of a decoder.

    True for what is no classifier: whoever loads it says so."""
    config = read_config(path)
    if not is_classifier(config):
        return True
    masked = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if config.num_labels != 1 or config.is_encoder_decoder or masked:
        return False
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)  # type: ignore[no-untyped-call]
    linear = isinstance(getattr(model, "score", None), nn.Linear)
    return linear and config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def _with_bias(model: PreTrainedModel, path: str | Path, loading: dict[str, Any]) -> PreTrainedModel:
    """``model``, whose linear head gets the bias that is stored, which transformers would leave out."""
    head = getattr(model, "score", None)
    if BIAS not in loading["unexpected_keys"] or not isinstance(head, nn.Linear):
        return model
    for file in weight_files(format_of(path).folder):
        with safe_open(file, "pt") as tensors:
            if BIAS in tensors.keys():  # noqa: SIM118  it is no dict
                head.bias = nn.Parameter(tensors.get_tensor(BIAS).to(head.weight))
                loading["unexpected_keys"] -= {BIAS}
    return model


def _language_head(config: PretrainedConfig) -> set[str]:
    """Names of the tensors of a language model that its backbone lacks, as files spell them (GPT-NeoX: embed_out)."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    backbone = f"{model.base_model_prefix}."
    names = {name: weight for name, weight in model.state_dict().items() if not name.startswith(backbone)}
    return {*names, *revert_weight_conversion(model, names)}
