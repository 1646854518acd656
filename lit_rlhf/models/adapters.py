"""Models that peft has put adapters into: which weights they amount to, and the same models without them.

Nothing here asks which kind of adapter it is: rank and scale by pattern, DoRA, biases, whole modules and rows of an
embedding are all told by the layer that peft made."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lit_rlhf.models.loading import checkpoint_format, keep_format, keep_intended
from lit_rlhf.models.quantization import is_quantized, plain_weight

Layer = Any  # a module, plain or wrapped by peft: torch gives the attributes of modules no types


def adapted_modules(model: nn.Module) -> dict[str, Layer]:
    """The modules of ``model`` that peft has wrapped, by name, outermost ones only; none without adapters."""
    found: dict[str, Layer] = {}
    if "peft" not in sys.modules:  # who has not imported it has no adapters, and need not wait for it
        return found
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    for name, module in model.named_modules():
        within = any(name.startswith(f"{outer}.") for outer in list(found)[-1:])  # modules come depth first
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) and not within:
            found[name] = module
    return found


def lora_layers(model: nn.Module) -> dict[str, Layer]:
    """The matrices and embeddings of ``model`` that have low-rank adapters, by name; none without LoRA."""
    kinds = ("lora_A", "lora_embedding_A")
    return {n: m for n, m in adapted_modules(model).items() if any(len(getattr(m, kind, ())) for kind in kinds)}


def effective_weight(module: Layer) -> Tensor:
    """The weight that a linear module, an embedding or a norm computes with: with its adapters where they are on, and
    dequantized. Gradients flow into the adapters."""
    if hasattr(module, "modules_to_save"):
        return effective_weight(_in_use(module))
    if hasattr(module, "token_adapter"):
        return effective_weight(module.token_adapter)
    if not hasattr(module, "base_layer"):
        return plain_weight(module)
    weight: Tensor = plain_weight(module.get_base_layer())
    if module.disable_adapters or module.merged:
        return weight
    if hasattr(module, "trainable_tokens_delta"):
        weight = module.get_merged_weights(module.active_adapters)
        return weight
    for name in _adapters_of(module):
        variant = module.lora_variant.get(name)
        if variant is None:
            weight = weight + module.get_delta_weight(name).to(weight.dtype)
        else:
            weight = variant.merge_safe(module, name, weight)
            module._caches.clear()  # peft keeps there what it needs to undo a merge
    return weight


def effective_bias(module: Layer) -> Tensor | None:
    """The bias that a module computes with, as :func:`effective_weight`; None where there is none."""
    if hasattr(module, "modules_to_save"):
        return effective_bias(_in_use(module))
    if not hasattr(module, "base_layer"):
        return getattr(module, "bias", None)
    bias = getattr(module.get_base_layer(), "bias", None)
    if module.disable_adapters or module.merged:
        return bias
    for name in _adapters_of(module):
        if module.lora_bias.get(name):
            more = module.lora_B[name].bias * module.scaling[name]
            bias = more if bias is None else bias + more
    return bias


def wrapped_module(module: Layer) -> Layer:
    """The module inside of peft's; itself where it is a plain one."""
    if hasattr(module, "modules_to_save"):
        return _in_use(module)
    return module.get_base_layer() if hasattr(module, "base_layer") else module


def _adapters_of(layer: Layer) -> list[str]:
    """Its adapters that are on; an active one need not be in every layer."""
    return [name for name in layer.active_adapters if name in layer.scaling]


def _in_use(wrapper: Layer) -> Layer:
    """The copy of a whole module that is trained, or, where adapters are off, the module as it was."""
    return wrapper.original_module if wrapper.disable_adapters else wrapper.modules_to_save[wrapper.active_adapters[0]]


def plain_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) as a checkpoint of ``model`` without adapters has them; tied ones under each of their names.

    Matrices are put together one by one, as they are asked for."""
    if is_quantized(model):
        yield from merged(model).state_dict().items()
        return
    shell = _shell(model)
    for name, wrapper in adapted_modules(shell).items():
        for inner, weight in _plain(wrapper).state_dict().items():
            yield f"{name}.{inner}", weight
        shell.set_submodule(name, nn.Identity())
    yield from shell.state_dict().items()


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[nn.Module]:
    """``model`` as it was before it got adapters; biases that are trained beside them stay as they are."""
    layers = adapted_modules(model).values()
    trained = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]
    _enable(layers, False)
    try:
        yield model
    finally:
        _enable(layers, True)
        for parameter, was in trained:  # peft freezes adapters that it turns off, and trains those that it turns on
            parameter.requires_grad_(was)


def _enable(layers: Iterable[Layer], on: bool) -> None:
    for outer in layers:
        for layer in outer.modules():  # several parameters of one module are wrapped one around the other
            if hasattr(layer, "enable_adapters"):
                layer.enable_adapters(on)


def merged(model: PreTrainedModel, quantized: bool = False) -> PreTrainedModel:
    """``model`` with its adapters added into its matrices, a plain model again.

    Only what has an adapter is a new tensor: all else is shared with ``model``, which stays as it is. A quantized
    matrix becomes numbers again, but for those without an update where ``quantized`` ones may stay."""
    modules = adapted_modules(model)
    if not modules and (quantized or not is_quantized(model)):
        return model
    shell: PreTrainedModel = _shell(model)
    linear = [(name, module) for name, module in shell.named_modules() if isinstance(module, nn.Linear)]
    packed = [name.removesuffix(".base_layer") for name, module in linear if is_quantized(module)]
    for name, wrapper in adapted_modules(shell).items():
        shell.set_submodule(name, _plain(wrapper, quantized))
    if packed and not quantized:
        _dequantize(shell, packed)
    if hasattr(shell, "peft_config"):
        del shell.peft_config
    _untie_what_differs(shell)
    return shell


def _shell(model: Layer) -> Layer:
    """A copy of ``model`` with parameters of its own that share their memory with those of ``model``."""
    memo: dict[int, object] = {id(b): b for b in model.buffers()}
    for parameter in model.parameters():
        own = (
            nn.Parameter(parameter.detach(), parameter.requires_grad) if type(parameter) is nn.Parameter else parameter
        )
        memo[id(parameter)] = own
    shell = copy.deepcopy(model, memo)
    keep_format(shell, checkpoint_format(model))
    keep_intended(shell, model)
    return shell


def _plain(wrapper: Layer, quantized: bool = False) -> Layer:
    """The module that one of peft's amounts to, out of a :func:`_shell`."""
    if hasattr(wrapper, "modules_to_save"):
        return _in_use(wrapper)
    if hasattr(wrapper, "parameter_name"):  # of the experts of a mixture: a tensor that no linear module holds
        inner, name = wrapper.base_layer, wrapper.parameter_name
        inner = _plain(inner) if hasattr(inner, "base_layer") else inner
        weight = getattr(inner, name)
        if not wrapper.disable_adapters:
            weight = weight + sum(wrapper.get_delta_weight(a).to(weight.dtype) for a in _adapters_of(wrapper))
        inner.register_parameter(name, nn.Parameter(weight.detach(), False))
        return inner
    layer = wrapper.token_adapter if hasattr(wrapper, "token_adapter") else wrapper
    base = layer.get_base_layer()
    if quantized and is_quantized(base) and not changes(layer):
        return base
    weight, bias = effective_weight(layer).detach(), effective_bias(layer) if hasattr(layer, "lora_bias") else None
    if is_quantized(base):
        base = _linear_like(base)
    base.weight = nn.Parameter(weight, False)
    if bias is not None:
        base.bias = nn.Parameter(bias.detach(), False)
    return base


def changes(layer: Layer) -> bool:
    """Whether the adapters of a module change what it computes; without values (on ``meta``) they do not."""
    base, bias = layer.get_base_layer(), effective_bias(layer)
    weights = effective_weight(layer), plain_weight(base)
    if weights[0].is_meta:
        return False
    same_bias = bias is None or (base.bias is not None and torch.equal(bias, base.bias))
    return not (same_bias and torch.allclose(*weights, rtol=1e-5, atol=1e-7))


def _dequantize(model: Layer, names: list[str]) -> None:
    """Modules of numbers, of the kind that a model of this architecture has, in the place of those ``names``."""
    with torch.device("meta"):
        usual = type(model)(model.config)
    for name in names:
        module: Layer = model.get_submodule(name)
        module = _linear_like(module) if is_quantized(module) else module
        if isinstance(usual.get_submodule(name), Conv1D):  # which was quantized turned around
            module.weight = nn.Parameter(module.weight.t().contiguous(), False)
            conv = Conv1D(module.out_features, module.in_features)  # type: ignore[no-untyped-call]
            conv.weight, conv.bias = module.weight, module.bias
            module = conv
        model.set_submodule(name, module)
    for name in ("is_quantized", "is_loaded_in_4bit", "hf_quantizer", "quantization_method"):
        model.__dict__.pop(name, None)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _linear_like(module: Layer) -> nn.Linear:
    """A linear module of numbers in the place of a quantized one."""
    linear = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(plain_weight(module), False)
    linear.bias = module.bias
    return linear


def _untie_what_differs(model: Layer) -> None:
    """An embedding that was trained apart from the head that it was tied to is written down beside it."""
    config: Any = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False) or not hasattr(model, "get_output_embeddings"):
        return
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is embedding.weight:
        return
    same = head.weight.shape == embedding.weight.shape
    if same and (head.weight.is_meta or torch.equal(head.weight, embedding.weight)):
        head.weight = embedding.weight
    else:
        config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}
