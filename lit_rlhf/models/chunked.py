"""Measures of next-token distributions, without the logits of all tokens at once.

Tokens times vocabulary is the largest tensor of a batch, and a loss needs it some four times over. Here logits are
computed for some tokens at a time, and a second time in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lit_rlhf.functional import token_logprobs
from lit_rlhf.models.gathering import gathers
from lit_rlhf.models.logits import check_logits, next_token_logits

LOGITS = 2**26  # bytes of float32 logits at once
PIECE = 2**20  # weights of a head that are cast at once

_adds: ContextVar[bool] = ContextVar("adds_to_gradients", default=False)

Measure = Callable[..., Tensor]  # (logits (m, V), *what else is known of those tokens (m, ...)) -> (m, ...)


@gathers
def by_token(model: PreTrainedModel, measure: Measure, hidden: Tensor, *others: Tensor, size: int = LOGITS) -> Tensor:
    """``measure(logits, *others)`` (M, ...) of the tokens with the hidden states (M, D), each token by itself.

    ``others`` (M, ...), through which no gradient flows, are cut as ``hidden`` is. No more than ``size`` bytes of
    float32 logits are there at a time; where those of all tokens fit, ``hidden`` (..., D) is not cut at all."""
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    check_logits(model)  # now: below, the head is not what it is
    # Some families train more than a matrix between hidden states and logits.
    beside = [m for m in model.children() if m is not model.base_model and m is not head]
    alone = not any(p.requires_grad for m in beside for p in m.parameters())
    logits = partial(next_token_logits, model)
    return by_row(logits, head, measure, hidden, *others, size=size, alone=alone)


def by_row(
    logits: Callable[[Tensor], Tensor],
    head: Any,
    measure: Measure,
    hidden: Tensor,
    *others: Tensor,
    size: int = LOGITS,
    alone: bool = True,
) -> Tensor:
    """The same of ``logits(hidden)`` (M, V), which calls ``head`` once; ``alone``: it trains no other weights."""
    leading = hidden.shape[:-1]
    rows = max(1, size // (4 * head.weight.shape[0]))
    if leading.numel() <= rows:
        return measure(logits(hidden), *others)
    hidden, others = hidden.flatten(0, -2), tuple(x.flatten(0, len(leading) - 1) for x in others)
    if alone and torch.is_grad_enabled() and isinstance(head, nn.Linear):
        inputs = logits, head, measure, rows, hidden, head.weight, head.bias, *others
        found = _Chunked.apply(*inputs)  # type: ignore[no-untyped-call]
    else:  # nothing is kept, or adapters and other weights of the head's are trained, too

        def ask(*chunk: Tensor) -> Tensor:
            return measure(logits(chunk[0]), *chunk[1:])

        again = partial(checkpoint, ask, use_reentrant=False) if torch.is_grad_enabled() else ask
        found = torch.cat([again(*chunk) for chunk in _chunks(rows, hidden, *others)])
    return torch.unflatten(found, 0, leading)


def token_logprobs_of(model: PreTrainedModel, hidden: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability, in nats, of each of ``tokens`` (...) where the hidden states (..., D) predict it.

    The logits are divided by the ``temperature``."""

    def logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
        return token_logprobs(logits if temperature == 1 else logits / temperature, tokens)

    return by_token(model, logprobs, hidden, tokens)


@contextmanager
def adds_to_gradients(module: nn.Module) -> Iterator[None]:
    """Context manager that accumulates gradients of large embeddings and of output heads of the models inside
    ``module`` directly into ``weight.grad``.

    Without it each pass makes a gradient as large as the weight and adds it afterwards. For losses whose ``backward``
    is called only: neither ``torch.autograd.grad`` nor hooks on a head's weight see what is accumulated."""
    embeddings = [m for m in module.modules() if isinstance(m, nn.Embedding) and m.weight.requires_grad]
    here = [m for m in embeddings if not isinstance(m.weight, DTensor)]  # a sharded one is there where it is gathered
    large = [m for m in here if m.weight.nbytes > LOGITS and not m.sparse]
    token = _adds.set(True)
    try:
        for embedding in large:
            if embedding.weight.grad is None:
                embedding.weight.grad = torch.zeros_like(embedding.weight)
            # Of its gradient the rows that were read, which are added to all rows there are; meta has no such thing.
            embedding.sparse = not embedding.weight.is_meta
        yield
    finally:
        _adds.reset(token)
        for embedding in large:
            embedding.sparse = False


def _chunks(rows: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(torch.split(x, rows) for x in tensors))


class _Chunked(torch.autograd.Function):
    """Keeps hidden states alone. The gradient of the head's matrix is gathered in one place, chunk by chunk; see
    :func:`adds_to_gradients`."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Callable[[Tensor], Tensor],
        head: nn.Linear,
        measure: Measure,
        rows: int,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *others: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, *others)
        ctx.of = logits, head, measure, rows
        ctx.adds = _adds.get()
        kind = hidden.device.type.replace("meta", "cpu")  # tensors without numbers have no autocast of their own
        ctx.autocast = kind, torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        with _frozen(head, ctx.autocast[1]):
            return torch.cat([measure(logits(h), *o) for h, *o in _chunks(rows, hidden, *others)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *others = ctx.saved_tensors
        logits, head, measure, rows = ctx.of
        kind, dtype = ctx.autocast
        for_weight, for_bias = ctx.needs_input_grad[5:7]
        of_hidden = torch.empty_like(hidden)
        known = head.weight.grad if ctx.adds and for_weight else None
        of_weight = known if known is not None or not for_weight else torch.zeros_like(weight)
        of_bias = torch.zeros_like(bias) if for_bias else None
        chunks = _chunks(rows, hidden, of_hidden, slope, *others)
        with torch.autocast(kind, dtype, enabled=dtype is not None), _frozen(head, dtype):
            for h, of_h, of_measured, *o in chunks:
                h = h.detach().requires_grad_()
                with torch.enable_grad():
                    with _watched(head) as seen:
                        given = logits(h)
                    measured = measure(given, *o)
                entered, left = seen
                of_left, slope_of_h = torch.autograd.grad(measured, (left, h), of_measured)
                of_h.copy_(slope_of_h)
                with torch.autocast(kind, enabled=False):
                    if of_weight is not None:
                        _add_product(of_weight, of_left.flatten(0, -2).t(), entered.detach().flatten(0, -2))
                    if of_bias is not None:
                        of_bias += of_left.flatten(0, -2).sum(0)
                del given, measured, left, of_left
        of_weight = None if known is not None else of_weight
        return None, None, None, None, of_hidden, of_weight, of_bias, *(None for _ in others)


@contextmanager
def _frozen(head: nn.Linear, dtype: torch.dtype | None) -> Iterator[None]:
    """Within it ``head`` has its weights without gradients, and computes in the ``dtype`` of mixed precision (None: its
    own).

    On a GPU they are cast once for all chunks, for autocast keeps no cast of weights without gradients; on a CPU see
    :class:`_PieceByPiece`."""
    own = {name: p for name, p in head.named_parameters(recurse=False) if p.is_floating_point()}
    kept = dtype is None or head.weight.dtype in (dtype, torch.float64)  # which autocast leaves alone, too
    pieces = not kept and head.weight.device.type in ("cpu", "meta")
    try:
        for name, parameter in own.items():
            values = parameter.detach() if kept or pieces else parameter.detach().to(dtype)
            head.register_parameter(name, nn.Parameter(values, requires_grad=False))
        if pieces and dtype is not None:
            head.forward = partial(_product, head, dtype)  # type: ignore[method-assign]
        yield
    finally:
        head.__dict__.pop("forward", None)
        for name, parameter in own.items():
            head.register_parameter(name, parameter)


def _product(head: nn.Linear, dtype: torch.dtype, hidden: Tensor) -> Tensor:
    product: Tensor = _PieceByPiece.apply(hidden.to(dtype), head.weight)  # type: ignore[no-untyped-call]
    return product if head.bias is None else product + head.bias.to(dtype)


class _PieceByPiece(torch.autograd.Function):
    """``x @ weight.t()`` in the precision of x (..., D); weight (V, D) is cast a piece at a time, and no cast is kept.

    A piece is still in a processor's cache when it is multiplied, so that few tokens take no longer than with a cast of
    the whole matrix, which has half its size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return torch.cat([x @ piece.to(x.dtype).t() for piece in _pieces(weight)], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        [weight] = ctx.saved_tensors
        pieces = _pieces(weight)
        total = slope.new_zeros((*slope.shape[:-1], weight.shape[1]), dtype=weight.dtype)
        for piece, of_piece in zip(pieces, torch.split(slope, len(pieces[0]), -1)):
            total += of_piece @ piece.to(slope.dtype)
        return total.to(slope.dtype), None


def _pieces(weight: Tensor) -> Sequence[Tensor]:
    return torch.split(weight, max(1, PIECE // weight.shape[1]))


@contextmanager
def _watched(head: nn.Linear) -> Iterator[list[Tensor]]:
    """Gets what enters ``head`` (..., D) and what leaves it (..., V)."""
    seen: list[Tensor] = []
    hook = head.register_forward_hook(lambda _, entered, left: seen.extend((entered[0], left)))
    try:
        yield seen
    finally:
        hook.remove()


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds ``left @ right``, in the precision of ``left``; in another one than that of ``total`` piece by piece."""
    if left.dtype == right.dtype == total.dtype:
        total.addmm_(left, right)
        return
    right, rows = right.to(left.dtype), max(1, LOGITS // (4 * right.shape[1]))
    for piece, of_piece in zip(torch.split(total, rows), torch.split(left, rows)):
        piece.add_(of_piece @ right)
