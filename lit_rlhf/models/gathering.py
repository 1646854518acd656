"""Models whose weights lie sharded over several processes, read as if they were whole.

``fully_shard`` gathers the weights of a module for its ``forward``. Here hidden states, logits and scores are asked for
apart, by functions: each is computed as a forward pass of the outermost module, the root. All processes call them
equally often, for gathering is done together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.distributed._composable.contract import STATE_KEY
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

Model = TypeVar("Model")
Given = ParamSpec("Given")
Found = TypeVar("Found")

_roots: WeakKeyDictionary[nn.Module, ReferenceType[nn.Module]] = WeakKeyDictionary()
_reading: set[int] = set()  # roots whose weights are whole now


def make_root(root: nn.Module) -> None:
    """Let what is asked of a sharded ``root``, or of a model inside of it, gather the weights of the root."""
    module: Any = root
    # torch gathers for a method of the root, of which none calls a function: it has one while it is sharded.
    module.reading = lambda function: function()
    register_fsdp_forward_method(root, "reading")
    for inner in root.modules():
        _roots[inner] = ref(root)
    module.reading(lambda: None)  # fully_shard's root is the module that is read first
    # Whether a weight gets gradients is remembered from when it is first gathered, and adapters may be off then.
    for part in sharded_parts(root):
        part.unshard()
        part.reshard()


def end_root(root: nn.Module, keep: bool) -> None:
    """Make ``root`` a plain model again, on the CPU; where its weights are not to be kept, without values."""
    plain: dict[Tensor, nn.Parameter] = {}
    for sharded in root.parameters():
        value = full(sharded.detach())
        plain[sharded] = nn.Parameter(value.cpu() if keep else value.to("meta"), sharded.requires_grad)
    for inner in root.modules():
        _roots.pop(inner, None)
        for name, weight in list(inner.named_parameters(recurse=False)):
            inner.register_parameter(name, plain[weight])
    for part in sharded_parts(root):
        state = part._get_fsdp_state()
        for hook in (state._pre_forward_hook_handle, state._post_forward_hook_handle):
            hook.remove()
        part.__class__ = plain_class(part)  # the one that fully_shard had exchanged
        states = part.__dict__[STATE_KEY]  # of what torch has put around a module; process groups cannot be copied
        part.__dict__[STATE_KEY] = {wrapper: other for wrapper, other in states.items() if other is not state}
    del root.reading


def sharded_parts(module: nn.Module) -> list[FSDPModule]:
    """The parts of a module whose weights are gathered together, and itself where it is one; none where it is whole."""
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def sharded_root(model: Any) -> Any | None:
    """The root of a sharded model; None where its weights are whole anyway."""
    for part in (
        model,
        getattr(model, "base_model", None),
    ):  # a language model around a backbone may be made for one use
        if isinstance(part, nn.Module) and part in _roots:
            return _roots[part]()
    return None


def gathers(
    function: Callable[Concatenate[Model, Given], Found],
) -> Callable[Concatenate[Model, Given], Found]:
    """A function of a model, which may be sharded: its weights are whole while the function reads them."""

    def call(model: Model, /, *args: Given.args, **kwargs: Given.kwargs) -> Found:
        return gathered(model, partial(function, model, *args, **kwargs))

    return wraps(function)(call)


def gathered(model: Any, function: Callable[[], Found]) -> Found:
    """``function()`` while the weights of ``model`` are whole; gradients flow through what it returns."""
    root = sharded_root(model)
    if root is None or id(root) in _reading:
        return function()
    _reading.add(id(root))
    try:
        found: Found = root.reading(function)
        return found
    finally:
        _reading.discard(id(root))
        if not any(p.requires_grad for p in root.parameters()):
            root.reset_iter_state()  # it notes each pass for a backward pass, which never comes


@contextmanager
def whole(model: Any) -> Iterator[None]:
    """Within it all weights of ``model`` are whole, in each process: it may be read any number of times, by one process
    more often than by another. Without gradients."""
    root = sharded_root(model)
    parts = [] if root is None else sharded_parts(root)
    try:
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()


def gathered_dtype(model: Any) -> torch.dtype | None:
    """The precision of a sharded model's weights where they are gathered; None: their own, or it is not sharded."""
    root = sharded_root(model)
    return None if root is None else root._get_fsdp_state()._mp_policy.param_dtype


def plain_class(module: Any) -> Any:
    """The class of a module; of a sharded one that which it had before."""
    kind = type(module)
    return kind.__mro__[2] if issubclass(kind, FSDPModule) else kind


def full(tensor: Tensor) -> Tensor:
    """The tensor; of a sharded one all of it, which all processes ask for together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
