"""State of a checkpoint: what is trained. Frozen weights are on disk already."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn

from lit_rlhf.arguments import checked
from lit_rlhf.errors import UserError
from lit_rlhf.models.adapters import lora_layers
from lit_rlhf.models.gathering import full
from lit_rlhf.training.fsdp import FSDP2

SAMPLED = 4096  # bytes of each tensor that are looked at one by one
PIECE = 2**20  # numbers that are summed at once


class TrainedState(LightningModule):
    """A module whose ``state_dict`` leaves out frozen models and, of models with adapters, their frozen base.

    ``frozen_models`` are the beginnings of the names of models that are never trained. A checkpoint keeps a fingerprint
    of the base that its adapters belong on: to go on from it with another base raises ``UserError``."""

    frozen_models: tuple[str, ...] = ()
    not_exported: tuple[str, ...] = ()  # names of models that :meth:`end_sharding` may leave as they are

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        if "__init__" in vars(cls):
            checked(cls)

    def configure_model(self) -> None:
        """Shard the models, where the trainer's strategy is to; several times is as good as once."""
        strategy = None if self._trainer is None else self._trainer.strategy
        if isinstance(strategy, FSDP2):
            strategy.shard(self)

    def end_sharding(self) -> None:
        """Make sharded models plain ones, which can be exported, in the first process; all processes call it."""
        if isinstance(self.trainer.strategy, FSDP2):
            self.trainer.strategy.end_sharding(self, self.not_exported)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        left_out = (*self.frozen_models, *self._base_names())
        return {k: v for k, v in super().state_dict(*args, **kwargs).items() if not k.startswith(left_out or "\0")}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """What was left out stays as it is; anything else that does not match is an error where ``strict``."""
        left_out = (*self.frozen_models, *self._base_names())
        found = super().load_state_dict(state_dict, strict=False, assign=assign)
        missing = [name for name in found.missing_keys if not name.startswith(left_out or "\0")]
        if strict and (missing or found.unexpected_keys):
            wrong = {"missing": missing, "unexpected": found.unexpected_keys}
            names = [f"{len(n)} {what} ({n[0]})" for what, n in wrong.items() if n]
            raise UserError(
                f"the checkpoint is not of this model: of its tensors, {' and '.join(names)}; put the right one back, "
                "or begin anew with overwrite=true"
            )
        return found

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if prints := self._base_fingerprints():
            checkpoint["base"] = prints

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        known, now = checkpoint.get("base", {}), self._base_fingerprints()
        for name in known.keys() | now.keys():
            if known.get(name) != now.get(name):
                raise UserError(
                    f"the checkpoint's adapters belong on another {name} than this one: its frozen weights have "
                    "changed since; put them back, or begin anew with overwrite=true"
                )

    def _base_names(self) -> tuple[str, ...]:
        """Names of the frozen weights that are not kept."""
        return tuple(name for model in self._adapted() for name, _ in _frozen(*model))

    def _base_fingerprints(self) -> dict[str, str]:
        """Model -> fingerprint of its frozen weights, which is taken once: they do not change."""
        if not hasattr(self, "_prints"):
            self._prints = {name: weights_fingerprint(t for _, t in _frozen(name, m)) for name, m in self._adapted()}
        return self._prints

    def _adapted(self) -> list[tuple[str, nn.Module]]:
        return [(name, child) for name, child in self.named_children() if lora_layers(child)]


def _frozen(name: str, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    # Tied weights under each of their names, as a state_dict has them.
    parameters = model.named_parameters(remove_duplicate=False)
    return ((f"{name}.{inner}", p) for inner, p in parameters if not p.requires_grad)


def weights_fingerprint(tensors: Iterable[Tensor]) -> str:
    """16 hex digits that tell weights in memory from others; of sharded ones all processes ask for them together.

    Of each tensor: its shape, the sum of its bits as integers, which any change of one number changes, and some of its
    bytes. Hashing all bytes of a large model would take minutes."""
    digest = hashlib.sha256()
    scales: list[Tensor] = []  # of weights of few bits
    for tensor in chain(tensors, scales):  # which the loop adds to
        if getattr(tensor, "quant_state", None) is not None:
            scales.append(tensor.quant_state.absmax)
        numbers = full(tensor.detach()).contiguous()
        bits = numbers.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[numbers.element_size()])
        sample = bits.flatten()[:: max(1, bits.numel() * numbers.element_size() // SAMPLED)]
        # Piece by piece: torch widens all that it sums.
        total = int(sum(piece.sum(dtype=torch.int64) for piece in bits.flatten().split(PIECE)))
        digest.update(f"{tuple(tensor.shape)} {total}".encode())
        digest.update(sample.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
