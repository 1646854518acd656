"""Memory that a computation takes, found by a dry run on tensors without values (torch's ``meta`` device).

Floating-point tensors have a shape and no values, so a model of any size takes no memory. Integers and masks (token
ids, positions, lengths) are real, so that what depends on them is as it will be; those computed from values are 0."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._composable import checkpoint
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from lit_rlhf.models.chunked import adds_to_gradients
from lit_rlhf.models.loading import intend_dtype
from lit_rlhf.models.policy import layers
from lit_rlhf.training.memory import bytes_of

aten = torch.ops.aten
PRODUCTS = {F.linear, torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum, Tensor.__matmul__}
CPU, META = torch.device("cpu"), torch.device("meta")


class Meter(TorchDispatchMode):
    """Counts the bytes of tensors on ``meta`` while what runs inside of it allocates and frees them.

    ``live`` now and ``peak`` at most, those of ``model`` included; ``activations``, the most that a
    forward pass kept; ``cache``, the most that keys and values of a rollout took. With a trainer's mixed ``precision``
    products are cast as autocast does it on ``device`` ("cpu" or "cuda"). With ``shards`` the weights and gradients of
    ``model`` lie sharded over so many processes (FSDP2), of which one is metered.

    What an iteration sends: ``steps`` times gradients are summed where models are whole; where they are sharded,
    ``gathered`` bytes of weights (``whole`` for a rollout) and gradients of ``passes`` backward passes. What is
    metered is done ``times`` in an iteration. ``adds``: gradients are added where they are kept."""

    def __init__(self, model: nn.Module, precision: str = "32-true", device: str = "cpu", shards: int = 1) -> None:
        super().__init__()
        self.live = self.peak = self.activations = self.cache = self.whole = 0
        self.shards, self.steps, self.passes, self.gathered, self.times, self.adds = shards, 1, 0.0, 0.0, 1.0, True
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        self._parts: weakref.WeakSet[Any] = weakref.WeakSet()
        # What an operation makes of which shapes: torch takes longer to say so than all the rest does, for every layer.
        self._calls: dict[Any, Any] = {}
        half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
        # How much wider the weights that a process keeps are than those that it gathers.
        self.widening = 2 if half is not None and shards > 1 else 1
        if shards > 1:
            self._shard(model, half)
            half = None  # the weights that are gathered have it
        else:
            self._note([*model.parameters(), *model.buffers()])
        functions = _OnTheDevice(half, torch.float32 if device == "cpu" else half)  # see kernels.attention
        for layer in filter(checkpoint.state, model.modules()):
            # Computed again in the backward pass, where torch leaves such modes aside.
            layer.register_forward_pre_hook(lambda *_: functions.__enter__() and None)
            layer.register_forward_hook(lambda *_: functions.__exit__(None, None, None), always_call=True)
        self._modes = [functions, torch.autocast("cpu", half or torch.bfloat16, enabled=half is not None)]

    def __enter__(self) -> Meter:
        for mode in self._modes:
            mode.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def learn(self, module: nn.Module, loss: Callable[[], Tensor], in_parts: bool, times: float = 1) -> None:
        """Forward and backward pass of a loss; ``in_parts``: the gradients of other parts of its batch are there."""
        self.times, self.passes = times, self.passes + times
        for parameter in (p for p in module.parameters() if in_parts and p.requires_grad):
            parameter.grad = torch.zeros_like(parameter)
            self._keep_part(parameter)
        before = self.live
        with adds_to_gradients(module) if self.adds else nullcontext():
            value = loss()
        self.activations = max(self.activations, self.live - before)
        value.backward()
        module.zero_grad()

    def _shard(self, model: nn.Module, half: torch.dtype | None) -> None:
        """Count this process's part of ``model``, and what it gathers of it: at most the layer at work, the next one as
        it arrives and as it is laid out, and of each model that is trained what is not in layers, once more where that
        is larger, as it arrives or its gradients leave."""
        self.live += bytes_of([*model.parameters(), *model.buffers()]) // self.shards
        models = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
        layer = rest = 0
        for backbone, root in {m.base_model: m for m in reversed(models)}.items():  # the outermost with this backbone
            size, *parts = (bytes_of(x.parameters()) // self.widening for x in (root, *layers(backbone)))
            trained = any(p.requires_grad for p in root.parameters())
            backbone.register_forward_pre_hook(partial(self._gather, size, trained))
            layer, rest = max([layer, *parts]), rest + (size - sum(parts)) * trained
            intend_dtype(root, root.dtype)  # from which follows how much it is given at a time
        self.live += max(3 * layer, rest) + rest
        model.to(half)
        self._known.update(x.untyped_storage() for x in (*model.parameters(), *model.buffers()))
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter.register_post_accumulate_grad_hook(self._keep_part)

    def _gather(self, size: int, trained: bool, *_: Any) -> None:
        self.gathered += self.times * size * (2 if trained and torch.is_grad_enabled() else 1)

    def _keep_part(self, parameter: Tensor) -> None:
        """Of a gradient a process keeps its part, in float32 where the weight is."""
        storage = parameter.grad.untyped_storage()
        if self.shards > 1 and storage not in self._parts:
            self._parts.add(storage)
            away = storage.nbytes() - storage.nbytes() * self.widening // self.shards
            self._add(-away)
            weakref.finalize(storage, self._add, away).atexit = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kinds = {x.is_meta for x in _tensors((args, *kwargs.values()))}
        makes_new = not (func.is_view or func._schema.is_mutable or func is aten._unsafe_view.default)
        call = (func, _shapes((args, *kwargs.items()))) if makes_new and kinds == {True} else None
        out = self._calls[call]() if call in self._calls else self._computed(func, args, kwargs, kinds)
        if call and isinstance(out, Tensor) and out.is_meta:
            self._calls[call] = partial(torch.empty_strided, out.shape, out.stride(), dtype=out.dtype, device=META)
        self._note(_tensors(out))
        return out

    def _computed(self, func: Any, args: Any, kwargs: Any, kinds: set[bool]) -> Any:
        if True in kinds and func is aten._local_scalar_dense.default:
            return 0.0
        if True in kinds and func in (aten.masked_select.default, aten.masked_scatter_backward.default):
            size = [int(args[1].sum())] if func is aten.masked_select.default else args[2]
            func, args = aten.new_empty.default, (args[0], size)  # as large as a real mask says
        elif True in kinds and func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            args = (args[0], [i for index in args[1] for i in _places(index)], *args[2:])
        if len(kinds) > 1:
            args, kwargs = tree_map(lambda x: x.to(META) if isinstance(x, Tensor) else x, (args, kwargs))
        return tree_map(_real_integers, func(*args, **kwargs))

    def _note(self, found: Iterable[Tensor]) -> None:
        for x in found:
            if x.is_meta and (storage := x.untyped_storage()) not in self._known:
                self._known.add(storage)
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes()).atexit = False

    def _add(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)


class _OnTheDevice(TorchFunctionMode):
    """What ``meta`` does otherwise than a real device: integers, autocast, and the kernel of attention."""

    def __init__(self, half: torch.dtype | None, attention: torch.dtype | None) -> None:
        super().__init__()
        self.half, self.attention = half, attention

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.tolist and args[0].is_meta:
            return torch.zeros(args[0].shape).tolist()
        kind = args[0].dtype if func is Tensor.to else kwargs.get("dtype") or torch.float32
        if func in (torch.arange, torch.tensor) or not (kind.is_floating_point or kind.is_complex):
            args = tuple(CPU if isinstance(x, torch.device) else x for x in args)
            kwargs |= {"device": CPU} if kwargs.get("device") is not None else {}
        attends = func is F.scaled_dot_product_attention
        if self.half is not None and torch.is_autocast_enabled("cpu") and (attends or func in PRODUCTS):
            old, new = (torch.float32, self.half), self.attention if attends else self.half
            cast = lambda x: x.to(new) if isinstance(x, Tensor) and x.is_meta and x.dtype in old else x  # noqa: E731
            args, kwargs = tree_map(cast, (args, kwargs))
        return _attention(*args, **kwargs) if attends and args[0].is_meta else func(*args, **kwargs)


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, **more: Any) -> Tensor:
    """Attention by a fused kernel, of which meta has the CPU's; a GPU's keep as much for the backward pass."""
    if dropout_p or q.shape[-1] != v.shape[-1]:
        return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, **more)
    more = {name: more[name] for name in ("is_causal", "scale") if name in more}
    mask = None if attn_mask is None else torch.empty_like(attn_mask, dtype=q.dtype, device=META)
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, **more)[0]


def _tensors(x: Any) -> list[Tensor]:
    parts = x if isinstance(x, list | tuple) else ()
    return [x] if isinstance(x, Tensor) else [found for part in parts for found in _tensors(part)]


def _shapes(x: Any) -> Any:
    """Arguments of an operation on ``meta``, as far as they tell its outputs apart."""
    if isinstance(x, Tensor):
        return x.shape, x.stride(), x.dtype
    return tuple(map(_shapes, x)) if isinstance(x, list | tuple) else (type(x), x)


def _places(index: Tensor | None) -> tuple[Tensor | None, ...]:
    return index.nonzero(as_tuple=True) if index is not None and index.dtype == torch.bool else (index,)


def _real_integers(x: Any) -> Any:
    values = not isinstance(x, Tensor) or not x.is_meta or x.is_floating_point() or x.is_complex()
    return x if values else torch.zeros(x.shape, dtype=x.dtype)
