"""Frozen reference policy, and whether it follows the policy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_rlhf.arguments import checked
from lit_rlhf.errors import UserError
from lit_rlhf.models.adapters import adapted_modules, adapters_off
from lit_rlhf.models.gathering import sharded_root
from lit_rlhf.models.loading import cast_to_intended, copied
from lit_rlhf.models.lora import starts_unchanged
from lit_rlhf.models.policy import freeze


@checked
@dataclass(frozen=True)
class ReferenceUpdate:
    """Update settings and precision of the reference policy of the KL penalty.

    Figures against the SFT model are of the model that training started from, whatever these settings are."""

    ema: Annotated[float, Field(ge=0, lt=1)] | None = None  # decay per iteration of its average of the policy
    refresh_every: Annotated[int, Field(ge=1)] | None = None  # iterations between two copies of the policy
    dtype: Literal["bfloat16", "float16"] | None = None  # of the frozen copy of the SFT model; None: the policy's

    def __post_init__(self) -> None:
        if self.ema is not None and self.refresh_every is not None:
            raise UserError("ema and refresh_every (ppo.reference) exclude each other; give one of them")


class Reference(nn.Module):
    """The policy as it began: a frozen copy or, with LoRA, the policy itself with its adapters off.

    Where turning them off would not do (an adapter that goes on being trained, biases that are trained beside), what
    is trained is small: a copy of it takes its place for the time.

    ``moving`` is the copy that the penalty is measured against where ``update`` makes it follow the policy."""

    def __init__(self, policy: PreTrainedModel, update: ReferenceUpdate) -> None:
        super().__init__()
        self.update = update
        lora = bool(adapted_modules(policy))
        moves = update.ema is not None or update.refresh_every is not None
        if lora and (moves or update.dtype is not None):
            raise UserError(
                "with LoRA there is no copy of the policy that could move or be made smaller: leave ppo.reference alone"
            )
        self.start = None if lora else freeze(copied(policy))
        if self.start is not None and update.dtype is not None:
            cast_to_intended(self.start).to(getattr(torch, update.dtype))
        # In the policy's own precision: in half of it, small steps of an average would be rounded away.
        self.moving = freeze(copied(policy)) if moves else None
        self._began: dict[str, Tensor] = {}
        if lora and not starts_unchanged(policy):
            self._began = {n: p.detach().clone() for n, p in policy.named_parameters() if p.requires_grad}
        if any(getattr(m, "p", 0) for n, m in policy.named_modules() if "lora_dropout" in n):
            rank_zero_warn(
                "lora_dropout is off here, as all dropout: policy and reference must begin as the same model"
            )

    @contextmanager
    def as_it_began(self, policy: PreTrainedModel) -> Iterator[PreTrainedModel]:
        """Context with the SFT model, the reference as it began."""
        if self.start is not None:
            yield self.start
        elif not self._began:
            with adapters_off(policy):
                yield policy
        elif sharded_root(policy) is not None:
            raise UserError(
                "trainer.strategy=fsdp2: with adapters that go on being trained, or weights trained beside them, the "
                "policy as it began cannot be had from a sharded one; begin with fresh adapters, or take trainer=ddp"
            )
        else:
            with _weights_replaced(policy, self._began):
                yield policy

    @contextmanager
    def for_penalty(self, policy: PreTrainedModel) -> Iterator[PreTrainedModel]:
        """Context with the model that the penalty is measured against."""
        if self.moving is not None:
            yield self.moving
        else:
            with self.as_it_began(policy) as model:
                yield model

    @torch.no_grad()
    def follow(self, policy: PreTrainedModel, iteration: int) -> None:
        """After ``iteration`` iterations (1 after the first): move, where that is wanted."""
        every, ema = self.update.refresh_every, self.update.ema
        if self.moving is None or (every is not None and iteration % every):
            return
        for mine, theirs in zip(self.moving.parameters(), policy.parameters()):
            mine.lerp_(theirs, 1.0 if ema is None else 1 - ema)


@contextmanager
def _weights_replaced(model: nn.Module, weights: dict[str, Tensor]) -> Iterator[None]:
    """``model`` with other ``weights``, by name; only for passes without gradients."""
    own = {name: model.get_parameter(name) for name in weights}
    kept = {name: parameter.data for name, parameter in own.items()}
    try:
        for name, parameter in own.items():
            parameter.data = weights[name].to(parameter.device, parameter.dtype)
        yield
    finally:
        for name, parameter in own.items():
            parameter.data = kept[name]
