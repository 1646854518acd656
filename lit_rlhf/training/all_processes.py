"""Results of all processes of a training, put together: a figure is that of all of them, not the mean of each one's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning import Trainer
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch import Tensor
from torch.distributed.distributed_c10d import _set_pg_timeout

from lit_rlhf.training.batches import BatchLoader

Item, Found = TypeVar("Item"), TypeVar("Found")

PATIENCE = timedelta(days=30)  # a judge behind a URL may take long; a process that ends is noticed all the same
TO_CONNECT = timedelta(minutes=10)  # one that has ended before is not


def patient_group() -> Any:
    """A group of all processes, of which one may do something alone for long; by gloo, also beside NCCL."""
    group = dist.new_group(backend="gloo", timeout=TO_CONNECT)
    _set_pg_timeout(PATIENCE, group)
    return group


@cache
def _group(world: Any) -> Any:
    """Of the processes in ``world``."""
    return patient_group()


def gather_all(trainer: Trainer, found: Found) -> list[Found]:
    """The results of all processes, by rank; tensors come on the CPU. Of one process: a list of it as it is.

    All processes call it together."""
    if trainer.world_size == 1:
        return [found]
    everyones: list[Any] = [None] * trainer.world_size
    dist.all_gather_object(everyones, move_data_to_device(found, "cpu"), group=_group(dist.group.WORLD))
    return everyones


def global_batch_index(trainer: Trainer | None, batch_idx: int) -> int:
    """The number, among those of all processes, of a batch that is one process's alone; None: there is one process."""
    return batch_idx if trainer is None else batch_idx * trainer.world_size + trainer.global_rank


def gather_step(trainer: Trainer | None, found: Found, batch_idx: int, dataloader_idx: int = 0) -> list[Found]:
    """The results of all processes in a step of an evaluation, in the order of their batches.

    What was read to fill up, as the data have no batch left for this process, is not among it. ``trainer`` None: a
    step by hand, without one."""
    if trainer is None:
        return [found]
    loaders = getattr(trainer, f"{trainer.state.stage.dataloader_prefix}_dataloaders")
    loader = loaders[dataloader_idx] if isinstance(loaders, list) else loaders
    fills_up = isinstance(loader, BatchLoader) and loader.fills_up(batch_idx)
    return [each for each in gather_all(trainer, None if fills_up else found) if each is not None]


def distributed_map(trainer: Trainer, items: Sequence[Item], read: Callable[[Item], Found]) -> list[Found]:
    """``read(item)`` of all items, in their order: each is counted once, and all processes read equally often."""
    size = trainer.world_size
    places = range(trainer.global_rank, -(-len(items) // size) * size, size)
    own = [read(items[place % len(items)]) for place in places]
    return interleaved(gather_all(trainer, own))[: len(items)]


def interleaved(parts: Sequence[Sequence[Item]]) -> list[Item]:
    """The first items of all parts, then the second ones, ...: what was dealt out in turn, in order again.

    >>> interleaved([[0, 3], [1], [2]])
    [0, 1, 2, 3]
    """
    places = sorted((place, part) for part, items in enumerate(parts) for place in range(len(items)))
    return [parts[part][place] for place, part in places]


def mean_of_all(trainer: Trainer, watched: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """Means over the processes of scalars, by the same names in all of them.

    None: this process has nothing to add; it counts as 0, and where all say so there is no mean."""
    known = {name: value for name, value in watched.items() if value is not None}
    if trainer.world_size == 1:
        return known
    like = next(iter(known.values()))
    none = like.new_zeros(2, dtype=torch.float64)
    pairs = [none if v is None else torch.stack([v.detach().to(none), none.new_ones(())]) for v in watched.values()]
    sums = trainer.strategy.reduce(torch.stack(pairs), reduce_op="sum")
    means = (sums[:, 0] / trainer.world_size).to(like.dtype)
    return {name: mean for name, mean, count in zip(watched, means, sums[:, 1].tolist()) if count}
