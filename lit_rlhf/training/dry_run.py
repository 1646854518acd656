"""Memory that a computation takes, found by a dry run on tensors without values (torch's ``meta`` device).

Floating-point tensors have a shape and no values, so a model of any size takes no memory. Integers and masks (token
ids, positions, lengths) are real, so that what depends on them is as it will be; those computed from values are 0."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningDataModule
from torch import Tensor, nn
from torch.distributed._composable import checkpoint
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lit_rlhf.models.chunked import adds_to_gradients

aten = torch.ops.aten
PRODUCTS = {F.linear, torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum, Tensor.__matmul__}
CPU, META = torch.device("cpu"), torch.device("meta")


class Meter(TorchDispatchMode):
    """Counts the bytes of tensors on ``meta`` while what runs inside of it allocates and frees them.

    ``live`` now and ``peak`` at most, those of ``model`` and ``held`` others included; ``activations``, the most that a
    forward pass kept; ``cache``, the most that keys and values of a rollout took. With a trainer's mixed ``precision``
    products are cast as autocast does it on ``device`` ("cpu" or "cuda")."""

    def __init__(self, model: nn.Module, precision: str = "32-true", device: str = "cpu", held: int = 0) -> None:
        super().__init__()
        self.live = self.peak = held
        self.activations = self.cache = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        # What an operation makes of which shapes: torch takes longer to say so than all the rest does, for every layer.
        self._calls: dict[Any, tuple[bool, list[Any]]] = {}
        self._note([*model.parameters(), *model.buffers()])
        half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
        functions = _OnTheDevice(half, torch.float32 if device == "cpu" else half)  # see lit_rlhf.models.attention
        self._modes = [functions, torch.autocast("cpu", half or torch.bfloat16, enabled=half is not None)]
        for layer in model.modules():  # computed again in the backward pass, where torch leaves such modes aside
            if checkpoint.state(layer) is not None:
                layer.register_forward_pre_hook(lambda *_: functions.__enter__() and None)
                layer.register_forward_hook(lambda *_: functions.__exit__(None, None, None), always_call=True)

    def __enter__(self) -> Meter:
        for mode in self._modes:
            mode.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def fit(self, module: nn.Module, data: LightningDataModule, loss: Callable[[Any], Tensor]) -> None:
        """A step on the largest batch of training, and the ``loss`` of the largest of validation if that is larger."""
        batch = largest(data.train_dataloader())
        part = max(batch, key=_size).batch if isinstance(batch, list) else batch
        self.learn(module, lambda: loss(part), in_parts=isinstance(batch, list))
        held_out = largest(data.val_dataloader())
        if _size(held_out) > _size(part):
            with torch.no_grad():
                loss(held_out)

    def learn(self, module: nn.Module, loss: Callable[[], Tensor], in_parts: bool) -> None:
        """Forward and backward pass of a loss; ``in_parts``: the gradients of other parts of its batch are there."""
        for parameter in module.parameters() if in_parts else ():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        before = self.live
        with adds_to_gradients(module):
            value = loss()
        self.activations = max(self.activations, self.live - before)
        value.backward()
        module.zero_grad()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        kinds = {x.is_meta for x in _tensors((args, *kwargs.values()))}
        if kinds != {True} or not _makes_new(func):
            return self._computed(func, args, kwargs, kinds)
        call = func, _shapes((args, *kwargs.items()))
        if call not in self._calls:
            out = self._computed(func, args, kwargs, kinds)
            made = list(out) if isinstance(out, tuple) else [out]
            if all(isinstance(x, Tensor) and x.is_meta for x in made):
                self._calls[call] = isinstance(out, tuple), [(x.shape, x.stride(), x.dtype) for x in made]
            return out
        several, known = self._calls[call]
        made = [torch.empty_strided(shape, stride, dtype=dtype, device=META) for shape, stride, dtype in known]
        self._note(made)
        return tuple(made) if several else made[0]

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
        out = func(*args, **kwargs)
        out = _real_integers(out) if isinstance(out, Tensor) else tree_map(_real_integers, out)
        self._note([out] if isinstance(out, Tensor) else tree_leaves(out))
        return out

    def _note(self, found: Iterable[Any]) -> None:
        for x in found:
            if isinstance(x, Tensor) and x.is_meta and (storage := x.untyped_storage()) not in self._known:
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


@cache
def _makes_new(func: Any) -> bool:
    """Whether an operation gives new tensors, not its inputs or views of them."""
    return func is not aten._unsafe_view.default and not any(x.alias_info for x in func._schema.returns)


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, list | tuple):
        for part in x:
            yield from _tensors(part)


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


def largest(loaders: Any) -> Any:
    """The batch with most tokens among the first of a loader, or of several."""
    loaders = loaders if isinstance(loaders, list) else [loaders]
    return max((batch for loader in loaders for batch in islice(loader, 64)), key=_size)


def _size(batch: Any) -> int:
    if isinstance(batch, list):
        return sum(map(_size, batch))
    batch = getattr(batch, "batch", batch)  # of a part
    tokens = (batch.packed if hasattr(batch, "packed") else batch).tokens
    return tokens.numel() if isinstance(tokens, Tensor) else sum(map(len, tokens))


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind some tensors on ``meta``, shared memory counted once."""
    return sum({s: s.nbytes() for s in (t.untyped_storage() for t in tensors if t.is_meta)}.values())
