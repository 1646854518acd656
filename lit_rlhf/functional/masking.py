"""Averages over the positions that count. A mask is True where a position counts, always."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def check_shapes(**tensors: Tensor) -> None:
    """Raise ``ValueError`` where tensors that belong together, by their names, differ in shape; nothing under compile.

    >>> check_shapes(rewards=torch.zeros(4, 3), mask=torch.ones(4, 5))
    Traceback (most recent call last):
    ValueError: rewards (4, 3) and mask (4, 5) differ in shape
    """
    if torch.compiler.is_compiling():
        return
    (name, first), *others = tensors.items()
    for other, tensor in others:
        if tensor.shape != first.shape:
            raise ValueError(f"{name} {tuple(first.shape)} and {other} {tuple(tensor.shape)} differ in shape")


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    """Raise ``ValueError`` where the argument ``name`` is none of the ``known`` values.

    >>> check_choice("estimator", "k4", ["k1", "k2", "k3"])
    Traceback (most recent call last):
    ValueError: estimator='k4': 'k1', 'k2' or 'k3' was expected
    """
    if value not in known:
        *others, last = map(repr, known)
        raise ValueError(f"{name}={value!r}: {', '.join(others)} or {last} was expected")


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of ``values`` where ``mask`` is True, over ``dim`` or over everything.

    ``values`` and ``mask`` have the same shape. What stands at masked positions never matters, NaN included.

    >>> masked_sum(torch.tensor([1.0, 2.0, torch.nan]), torch.tensor([True, True, False]))
    tensor(3.)
    """
    check_shapes(values=values, mask=mask)
    kept = torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of ``values`` where ``mask`` is True, over ``dim`` or over everything; 0 where nothing counts.

    >>> masked_mean(torch.tensor([[1.0, 3.0], [5.0, 9.0]]), torch.tensor([[True, True], [True, False]]), dim=1)
    tensor([2., 5.])
    """
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(values, mask, dim) / count.clamp(min=1)


def population_std(values: Tensor) -> Tensor:
    """Population standard deviation of ``values`` (n,); NaN of none.

    >>> population_std(torch.tensor([1.0, 3.0]))
    tensor(1.)
    """
    return values.std(unbiased=False) if len(values) else values.new_tensor(float("nan"))


def whiten(values: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """Centre and scale ``values`` (B, T) by the mean and standard deviation of all valid positions together.

    One mean and one (population) deviation for the batch, so the order between samples is kept; masked
    positions come back as 0.

    >>> whiten(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]]))
    tensor([[-1.,  1.,  0.]])
    """
    check_shapes(values=values, mask=mask)
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    return torch.where(mask, (values - mean) * (variance + eps).rsqrt(), 0.0).to(values.dtype)


def power_sums(values: Tensor) -> Tensor:
    """Number, sum and sum of squares of ``values`` (n,), float64 (3,): those of several batches add up.

    >>> power_sums(torch.tensor([1.0, 3.0]))
    tensor([ 2.,  4., 10.], dtype=torch.float64)
    """
    x = values.double()
    return torch.stack([x.new_tensor(float(len(x))), x.sum(), (x**2).sum()])


def moments(sums: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, mean square) from :func:`power_sums`; 0 of no values.

    >>> moments(torch.tensor([2.0, 4.0, 10.0]))
    (tensor(2.), tensor(5.))
    """
    count, first, second = sums
    return first / count.clamp(min=1), second / count.clamp(min=1)


def std_from_moments(mean: Tensor, square: Tensor) -> Tensor:
    """Standard deviation that values may be divided by, from :func:`moments`: 1 where all values are alike, for their
    variance is a rounding error then.

    >>> std_from_moments(torch.tensor(2.0), torch.tensor(8.0)), std_from_moments(torch.tensor(2.0), torch.tensor(4.0))
    (tensor(2.), tensor(1.))
    """
    variance = square - mean**2
    return torch.where(variance > 1e-12 * square, variance, 1.0).sqrt()


def last_position(mask: Tensor) -> Tensor:
    """Index (B,) of the last True of each row of ``mask`` (B, T); padding may lie on either side.

    Raises ``ValueError`` if a row has no True.

    >>> last_position(torch.tensor([[True, True, False], [False, True, True]]))
    tensor([1, 2])
    """
    if not mask.any(-1).all():
        raise ValueError("a row of the mask has no valid position; drop empty sequences first")
    positions = torch.arange(mask.shape[-1], device=mask.device)
    return torch.where(mask, positions, -1).amax(-1)


def position_ids(mask: Tensor) -> Tensor:
    """Positions (B, T) that count real tokens only, so that padding on the left moves nothing.

    >>> position_ids(torch.tensor([[False, False, True, True], [True, True, True, True]]))
    tensor([[0, 0, 0, 1],
            [0, 1, 2, 3]])
    """
    return (mask.long().cumsum(-1) - 1).clamp(min=0)
