"""Logits from hidden states, by a model's own forward pass.

What stands between the last hidden states and the logits differs from family to family: a linear layer, its bias, a
transformation before it, a scale or a soft cap behind it. Only the model's own code knows all of it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from lit_rlhf.errors import UserError
from lit_rlhf.models.onednn import with_rows_added
from lit_rlhf.models.policy import rows_to_add
from lit_rlhf.models.self_check import difference, texts


def next_token_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits (..., V) of the next token from last hidden states (..., D) of ``model.base_model``, as ``model(...)``
    gives them; see :func:`check_logits`."""
    check_logits(model)
    if hidden.dim() != 2:
        return _own_logits(model, hidden)
    more = rows_to_add(model.base_model, len(hidden))
    return with_rows_added(lambda rows: _own_logits(model, rows[None]).squeeze(0), hidden, more)


def check_logits(model: PreTrainedModel) -> None:
    """Raise ``UserError`` for a family that looks ahead, or whose logits cannot be had apart from its trunk."""
    if fault := difference(model, "a text that is cut off", _cut_off_and_whole):
        raise UserError(f"{type(model).__name__}: no language model to sample from, for its tokens look ahead: {fault}")
    if fault := difference(model, "logits apart from its trunk", _apart_and_whole):
        raise UserError(
            f"{type(model).__name__}: a family that cannot be used here, for its logits cannot be computed from its "
            f"last hidden states: {fault}"
        )


def _cut_off_and_whole(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Logits of the beginning of a text, by the model itself: read by itself, and with what comes behind it."""
    whole, _, begun = (torch.tensor([text], device=model.device) for text in texts(model))
    alone, within = (model(input_ids=ids, use_cache=False).logits[0] for ids in (begun, whole))
    return alone, within[: len(alone)]


def _apart_and_whole(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Logits of a text: from its hidden states, and by the model itself."""
    ids = torch.tensor(texts(model)[:1], device=model.device)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return _own_logits(model, hidden)[0], model(input_ids=ids, use_cache=False).logits[0]


def _own_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The forward pass of a shallow copy of ``model``, which shares its weights, and whose trunk gives ``hidden``."""
    twin, trunk = copy.copy(model), model.base_model_prefix
    twin._modules = {**model._modules, trunk: _Given(model._modules[trunk], hidden)}
    return twin.forward(inputs_embeds=hidden).logits


class _Given(nn.Module):
    """In the place of a trunk: gives the hidden states that it was made with."""

    def __init__(self, trunk: nn.Module, hidden: Tensor) -> None:
        super().__init__()
        self.__dict__["trunk"] = trunk  # no child: its weights are not this module's
        self.hidden = hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self.trunk, name)  # factors that a model reads from its trunk

    @property
    def decoder(self) -> nn.Module:
        """Some models call their trunk's decoder."""
        return self

    def forward(self, *inputs: Any, **settings: Any) -> _States:
        return _States(self.hidden)


@dataclass
class _States(ModelOutput):
    """What a trunk gives, of any family: all but the hidden states is None."""

    last_hidden_state: Tensor | None = None

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
