"""Logits from hidden states, by a model's own forward pass.

What stands between the last hidden states and the logits differs from family to family: a linear layer, its bias, a
transformation before it, a scale or a soft cap behind it. Only the model's own code knows all of it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.generic import ModelOutput

from lit_rlhf.errors import UserError
from lit_rlhf.models.gathering import gathers, plain_class
from lit_rlhf.models.kernels.onednn import rows_to_add, with_rows_added
from lit_rlhf.models.self_check import ALIKE, difference, read


@gathers
def next_token_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits (..., V) of the next token from last hidden states (..., D) of ``model.base_model``, as ``model(...)``
    gives them; see :func:`check_logits`."""
    check_logits(model)
    if hidden.dim() != 2:
        return _own_logits(model, hidden)
    more = rows_to_add(model.base_model, len(hidden))
    return with_rows_added(lambda rows: _own_logits(model, rows[None]).squeeze(0), hidden, more)


def check_logits(model: PreTrainedModel) -> None:
    """Raise ``UserError`` for a model that cannot read a text, or looks ahead, or whose logits cannot be had apart from
    its backbone."""
    if model.base_model is model:
        raise UserError(f"{type(model).__name__} names no part without the head; choose another family")
    if fault := difference(model, "its own forward pass", lambda model: (read(model), read(model))):
        raise UserError(f"{type(model).__name__}: it cannot read a text with these settings: {fault}")
    if fault := difference(model, "another text behind it", _alike_before_others):
        raise UserError(f"{type(model).__name__}: no language model to sample from, for its tokens look ahead: {fault}")
    if fault := difference(model, "logits apart from its backbone", _apart_and_whole):
        raise UserError(
            f"{type(model).__name__}: a family that cannot be used here, for its logits cannot be computed from its "
            f"last hidden states: {fault}"
        )


_shells: WeakKeyDictionary[PreTrainedModel, PreTrainedModel] = WeakKeyDictionary()  # language models without a backbone


def language_model(backbone: PreTrainedModel, head: nn.Linear) -> PreTrainedModel:
    """The language model of ``backbone``'s family around it, with the output embedding ``head`` that was kept.

    It shares their weights. Raises ``UserError`` where the family's own has more weights than these two."""
    if backbone not in _shells:
        _shells[backbone] = _shell(backbone)
    model = copy.copy(_shells[backbone])
    model._modules = {**model._modules, model.base_model_prefix: backbone}
    own = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    model._modules = {name: head if module is own else module for name, module in model._modules.items()}
    if (own.bias is None) != (head.bias is None):
        raise UserError(f"{type(model).__name__}: its logits cannot be had from a reward model, which lacks their bias")
    model.training = backbone.training
    return model


def _shell(backbone: PreTrainedModel) -> PreTrainedModel:
    """The language model of ``backbone``'s config, its backbone and its output embedding without numbers."""
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(backbone.config)  # type: ignore[no-untyped-call]
    except ValueError as error:
        raise UserError(f"{type(backbone).__name__}: no family with a language model ({error})") from None
    model.config = backbone.config  # and no copy: whoever changes how it attends, changes it for both
    more: dict[str, Tensor] = {}
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    for name, module in model.named_children():
        if module is not head and name != model.base_model_prefix:
            more |= {f"{name}.{of}": weight for of, weight in module.state_dict().items()}
    if more or type(model.base_model) is not type(backbone) or not any(m is head for m in model.children()):
        raise UserError(
            f"{type(model).__name__}: its logits cannot be had from a reward model, which lacks "
            f"{', '.join(more) or 'a part of it'}"
        )
    model._modules[model.base_model_prefix] = None
    return model


def _alike_before_others(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Logits of the beginning of two texts that begin alike, by the model itself."""
    one, other = read(model)[:, :ALIKE]
    return one, other


def _apart_and_whole(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Logits of texts: from their hidden states, and by the model itself."""
    return _own_logits(model, read(model.base_model)).flatten(0, 1), read(model).flatten(0, 1)


def _own_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The forward pass of a shallow copy of ``model``, which shares its weights; its backbone gives ``hidden``."""
    kind, name = plain_class(model), model.base_model_prefix
    twin = kind.__new__(kind)
    twin.__dict__.update(model.__dict__)
    twin._modules = {**model._modules, name: _Given(model.get_submodule(name), hidden)}
    logits: Tensor = twin.forward(inputs_embeds=hidden).logits
    return logits


class _Given(nn.Module):
    """In the place of a backbone: gives the hidden states that it was made with."""

    def __init__(self, backbone: nn.Module, hidden: Tensor) -> None:
        super().__init__()
        self.__dict__["backbone"] = backbone  # no child: its weights are not this module's
        self.hidden = hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backbone, name)  # factors that a model reads from its backbone

    @property
    def decoder(self) -> nn.Module:
        """This object: some models apply their backbone's decoder."""
        return self

    def forward(self, *inputs: Any, **settings: Any) -> _States:
        return _States(self.hidden)


@dataclass
class _States(ModelOutput):
    """What a backbone gives, of any family: all but the hidden states is None."""

    last_hidden_state: Tensor | None = None

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
