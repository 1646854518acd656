"""Which kernels compute the models of this process."""

from __future__ import annotations

from typing import Literal, get_args

from lit_rlhf.errors import UserError

Kernels = Literal["fast", "plain"]

_chosen: list[Kernels] = ["fast"]


def use_kernels(kernels: Kernels) -> None:
    """Set the kernels of the whole process, as ``torch.set_float32_matmul_precision`` sets its precision.

    "fast": those of this folder, where they apply; "plain": transformers' modules as they are. Takes effect in the next
    forward pass, for models that are loaded already as well. Raises ``UserError`` for anything else."""
    if kernels not in get_args(Kernels):
        raise UserError(f"kernels={kernels}: it should be 'fast' or 'plain' (trainer.kernels)")
    _chosen[0] = kernels


def fast_kernels() -> bool:
    """Whether the kernels of this folder may be used."""
    return _chosen[0] == "fast"
