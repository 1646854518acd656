"""How much a model may be given at once, so that memory does not follow from how much there is."""

from __future__ import annotations

from collections.abc import Iterator
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_rlhf.models.loading import intended_dtype
from lit_rlhf.models.policy import layers

LEARNING = 0.5  # GiB that forward passes may keep for their backward pass, logits apart
LOOKING = 2**28  # bytes of one layer, where there is no backward pass


_kept_gib: WeakKeyDictionary[PreTrainedModel, float] = WeakKeyDictionary()


def limit_kept(backbone: PreTrainedModel, gib: float) -> None:
    """Let forward passes of ``backbone`` keep so many GiB for their backward pass, logits apart."""
    _kept_gib[backbone] = gib


def tokens_at_once(module: nn.Module, learning: bool) -> int:
    """Maximum number of tokens per pass of the models inside ``module``.

    ``learning``: of those that are trained, in one backward pass, by the GiB of activations that :func:`limit_kept`
    allows (``LEARNING`` unless it was called). Else by the memory of one layer, without gradients. Memory per token is
    estimated from the inputs and outputs of matrices."""
    models = list(backbones(module))
    if learning:
        trained = [m for m in models if any(p.requires_grad for p in m.parameters())]
        room = min((_kept_gib.get(m, LEARNING) for m in trained), default=LEARNING)
        return max(1, int(room * 2**30) // max(1, sum(map(_bytes_of_token, trained))))
    sizes = [_bytes_of_token(m) // max(1, len(layers(m))) for m in models]
    return max(1, LOOKING // max([1, *sizes]))


def backbones(module: nn.Module) -> Iterator[PreTrainedModel]:
    """The models inside ``module``, each without its head."""
    return (m for m in module.modules() if isinstance(m, PreTrainedModel) and m.base_model is m)


def _bytes_of_token(backbone: PreTrainedModel) -> int:
    experts = getattr(backbone.config, "num_experts_per_tok", None) or 1  # those of a layer lie in one tensor
    numbers = 0
    for part in backbone.modules():
        if isinstance(part, nn.Linear):
            numbers += part.in_features + part.out_features
        elif isinstance(part, Conv1D):
            numbers += sum(part.weight.shape)
        else:
            numbers += sum(experts * sum(p.shape[1:]) for p in part.parameters(recurse=False) if p.dim() == 3)
    return numbers * intended_dtype(backbone).itemsize
