"""Whether a faster form of a model computes what the model itself computes: asked once, on a few tokens.

Families differ in what they do: soft caps, sinks, windows, states that go on from token to token. No list of families
says for which of them a form holds; the model does, and what it said is kept here, not in the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_rlhf.errors import UserError, say
from lit_rlhf.models.gathering import gathered_dtype, plain_class, sharded_root
from lit_rlhf.models.kernels.attention import SDPA

# (model) -> what the form gives, and what the model's own forward pass gives, (tokens, ...) both
Compare = Callable[[PreTrainedModel], tuple[Tensor, Tensor]]
LENGTH, SHORTER, ALIKE = 9, 6, 3  # tokens of a text that is read, of the second where they differ, that both begin with
# Settings by which the models of one family that work together differ, and which change no hidden state
BESIDE = {
    "architectures", "dtype", "id2label", "label2id", "num_labels", "problem_type", "score_mean", "score_shift",
    "score_std", "transformers_version", "_name_or_path",
}  # fmt: skip

_answers: WeakKeyDictionary[nn.Module, dict[str, str | None]] = WeakKeyDictionary()
_by_kind: dict[tuple[Any, str, torch.dtype, str], str | None] = {}
_read: WeakKeyDictionary[PreTrainedModel, tuple[list[tuple[int, list[float]]], Tensor]] = WeakKeyDictionary()


def agrees(model: PreTrainedModel, form: str, compare: Compare, instead: str | None = None) -> bool:
    """Whether ``model`` computes the same in this ``form``; where not, a line says so, and what is done ``instead``."""
    return difference(model, form, compare, instead) is None


def difference(model: PreTrainedModel, form: str, compare: Compare, instead: str | None = None) -> str | None:
    """Description of how ``model`` in this ``form`` differs from its own forward pass; None where it does not.

    Found once per class and config. A model on the "meta" device has no values to compare and is not checked."""
    if model.device.type == "meta":
        return None
    known = _answers.setdefault(model.base_model, {})  # a language model around it may be made anew for each use
    if form not in known:
        settings = {name: value for name, value in model.config.to_dict().items() if name not in BESIDE}
        kind = plain_class(model), form, model.dtype, repr(sorted(settings.items()))
        if kind not in _by_kind:
            _by_kind[kind] = _difference(model, compare)
            if instead is not None and _by_kind[kind] is not None:
                say(f"{plain_class(model).__name__}: {instead}, for with {form} {_by_kind[kind]}")
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
    dtypes = {model.dtype, gathered_dtype(model)}
    narrow = bool(dtypes & {torch.bfloat16, torch.float16}) or torch.get_float32_matmul_precision() != "highest"
    return 0.1 if narrow else 1e-3


@contextmanager
def _as_loaded(model: PreTrainedModel) -> Iterator[None]:
    """Within it ``model`` is in evaluation mode, with transformers' attention."""
    training = [module for module in model.modules() if module.training]
    kind = model.config._attn_implementation
    model.eval()  # type: ignore[no-untyped-call]
    if kind in SDPA:
        model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        if model.config._attn_implementation != kind:
            model.set_attn_implementation(kind)
        for module in training:
            module.training = True


def texts(model: PreTrainedModel) -> Tensor:
    """Two texts to read, (2, LENGTH) token ids, of which the first ALIKE are the same."""
    config = model.config.get_text_config()
    vocabulary, pad = config.vocab_size, getattr(config, "pad_token_id", None)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(min(8, vocabulary - 2), vocabulary - 1, (2, LENGTH), generator=generator)
    tokens[tokens == (-1 if pad is None else pad)] += 1  # some families count positions by what is no padding
    tokens[1, :ALIKE] = tokens[0, :ALIKE]
    return tokens.to(model.device)


def read(model: Any) -> Tensor:
    """Outputs of the model's own forward pass on :func:`texts`: logits (2, LENGTH, V), or hidden states of a backbone.

    Several forms are compared with one such pass, as long as the weights stay as they are."""
    if sharded_root(model) is not None:  # weights that are gathered anew lie in the same place as those before them
        return _own_pass(model)
    # A fused optimizer changes weights in their places, and no version of theirs.
    weights = [(p.data_ptr(), p.detach().flatten()[:1].tolist()) for p in model.parameters()]
    known = _read.get(model)
    if known is None or known[0] != weights:
        known = _read[model] = weights, _own_pass(model)
    return known[1]


def _own_pass(model: Any) -> Tensor:
    output = model(input_ids=texts(model), use_cache=False)
    found: Tensor = output.last_hidden_state if model.base_model is model else output.logits
    return found
