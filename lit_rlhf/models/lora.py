"""Low-rank adapters (LoRA, arXiv:2106.09685) through peft: few weights to train, the model without them for free."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_rlhf.errors import UserError


@dataclass(frozen=True)
class LoRA:
    """Which adapters a model gets."""

    r: Annotated[int, Field(ge=0)] = 0  # rank of the update of each matrix; 0: no LoRA, all weights are trained
    alpha: Annotated[float, Field(gt=0)] = 16.0  # the update is scaled by alpha / r
    targets: list[str] | Literal["all-linear"] = "all-linear"  # ends of the names of the matrices


def add_lora(model: PreTrainedModel, lora: LoRA | None) -> PreTrainedModel:
    """Put adapters into ``model``, which start as no change; only they and a scalar head stay trainable.

    Nothing is done where ``lora`` is None or of rank 0. Raises ``UserError`` where its targets match nothing."""
    if lora is None or lora.r == 0:
        return model
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError("LoRA needs the package peft: pip install 'lit_rlhf[lora]'") from None
    linear = {name: m for name, m in model.base_model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    ends = list({name.rpartition(".")[2] for name in linear}) if lora.targets == "all-linear" else list(lora.targets)
    chosen = [name for name in linear if any(f".{name}".endswith(f".{end}") for end in ends)]
    if not chosen:
        known = sorted({name.rpartition(".")[2] for name in linear})
        raise UserError(f"lora.targets={list(lora.targets)} match no matrix of this model; it has {', '.join(known)}")
    conv = isinstance(linear[chosen[0]], Conv1D)  # GPT-2 keeps its matrices transposed
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    config = LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, target_modules=[prefix + name for name in chosen], fan_in_fan_out=conv
    )
    inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or name.startswith("score."))
    return model


def lora_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The matrices of ``model`` that have an adapter, by name; none without LoRA."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def effective_weight(module: nn.Module) -> Tensor:
    """The weight of a linear module, with its adapter's update where that is on."""
    if not hasattr(module, "lora_A"):
        return module.weight.detach()
    weight = module.get_base_layer().weight.detach()
    if module.disable_adapters or module.merged:
        return weight
    for name in module.active_adapters:
        weight = weight + module.get_delta_weight(name).detach()
    return weight


def plain_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) as a checkpoint of ``model`` without adapters has them; tied ones under each of their names."""
    adapted = lora_layers(model)
    for name, weight in model.state_dict().items():
        layer, _, kind = name.rpartition(".base_layer.")
        if layer:
            yield f"{layer}.{kind}", effective_weight(adapted[layer]) if kind == "weight" else weight
        elif ".lora_" not in name:
            yield name, weight


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[nn.Module]:
    """``model`` as it was before it got adapters."""
    layers = lora_layers(model).values()
    trained = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield model
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, was in trained:  # peft freezes adapters that it turns off, and trains those that it turns on
            parameter.requires_grad_(was)


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """``model`` with its adapters added into its matrices, a plain model again; a copy where there are any."""
    if not lora_layers(model):
        return model
    model = copy.deepcopy(model)
    for name, layer in lora_layers(model).items():
        layer.merge(safe_merge=True)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model
