"""Whether a faster form of a model computes what the model itself computes: asked once, on a few tokens.

Families differ in what they do: soft caps, sinks, windows, states that go on from token to token. No list of families
says for which of them a form holds; the model does, and what it said is kept here, not in the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_rlhf.errors import UserError, say
from lit_rlhf.models.attention import SDPA

# (model) -> what the form gives, and what the model's own forward pass gives, (tokens, ...) both
Compare = Callable[[PreTrainedModel], tuple[Tensor, Tensor]]
LENGTHS = (9, 6, 4)  # tokens of the texts that are read

_answers: WeakKeyDictionary[PreTrainedModel, dict[str, str | None]] = WeakKeyDictionary()
_by_kind: dict[tuple[type, str, torch.dtype, str], str | None] = {}


def agrees(model: PreTrainedModel, form: str, compare: Compare, instead: str | None = None) -> bool:
    """Whether ``model`` computes the same in this ``form``; where not, a line says so, and what is done ``instead``."""
    return difference(model, form, compare, instead) is None


def difference(model: PreTrainedModel, form: str, compare: Compare, instead: str | None = None) -> str | None:
    """How ``model`` in this ``form`` differs from its own forward pass; None: it does not.

    Models of one class and config are asked once. A model without numbers (device "meta") is believed."""
    if model.device.type == "meta":
        return None
    known = _answers.setdefault(model, {})
    if form not in known:
        kind = type(model), form, model.dtype, model.config.to_json_string(use_diff=False)
        if kind not in _by_kind:
            _by_kind[kind] = _difference(model, compare)
            if instead is not None and _by_kind[kind] is not None:
                say(f"{type(model).__name__}: {instead}, for with {form} {_by_kind[kind]}")
        known[form] = _by_kind[kind]
    return known[form]


@torch.no_grad()
def _difference(model: PreTrainedModel, compare: Compare) -> str | None:
    try:
        with _as_loaded(model), torch.autocast(model.device.type, enabled=False):
            found, expected = (x.double().flatten(1) for x in compare(model))
    except UserError:
        raise
    except Exception as error:  # whatever another library's code may raise when it is called in this way
        return f"it stops with {type(error).__name__}: {' '.join(str(error).split())[:120]}"
    off = ((found - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-12)).max().item()
    return None if off <= _tolerance(model) else f"results are off by {off:.2g} of their length"


def _tolerance(model: PreTrainedModel) -> float:
    """Relative error that rounding explains."""
    narrow = model.dtype in (torch.bfloat16, torch.float16) or torch.get_float32_matmul_precision() != "highest"
    return 0.1 if narrow else 1e-3


@contextmanager
def _as_loaded(model: PreTrainedModel) -> Iterator[None]:
    """Within it ``model`` is in evaluation mode, with transformers' attention."""
    training = [module for module in model.modules() if module.training]
    kind = model.config._attn_implementation
    model.eval()
    if kind in SDPA:
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if model.config._attn_implementation != kind:
            model.set_attn_implementation(kind)
        for module in training:
            module.training = True


def texts(model: PreTrainedModel) -> list[list[int]]:
    """Token ids to read; the last text is how the first one begins."""
    config = model.config.get_text_config()
    vocabulary, pad = config.vocab_size, getattr(config, "pad_token_id", None)
    generator = torch.Generator().manual_seed(0)
    first, second, last = LENGTHS
    tokens = torch.randint(min(8, vocabulary - 2), vocabulary - 1, (first + second,), generator=generator)
    tokens[tokens == (-1 if pad is None else pad)] += 1  # some families count positions by what is no padding
    return [tokens[:first].tolist(), tokens[first:].tolist(), tokens[:last].tolist()]
