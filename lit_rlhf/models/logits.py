"""Logits from hidden states, by a model's own forward pass.

What stands between the last hidden states and the logits differs from family to family: a linear layer, its bias, a
transformation before it, a scale or a soft cap behind it. Only the model's own code knows all of it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from lit_rlhf.models.onednn import with_rows_added
from lit_rlhf.models.policy import rows_to_add


def next_token_logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Logits (..., V) of the next token from last hidden states (..., D) of ``model.base_model``, as ``model(...)``
    gives them."""
    if hidden.dim() != 2:
        return _own_logits(model, hidden)
    more = rows_to_add(model.base_model, len(hidden))
    return with_rows_added(lambda rows: _own_logits(model, rows[None]).squeeze(0), hidden, more)


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
