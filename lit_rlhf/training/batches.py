"""The loader of every stage: sized, resumable to the batch, and alike for any number of processes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, islice
from typing import Any, Generic, TypeVar

import torch
from lightning import Trainer
from torch import Generator, Tensor
from torch.utils._pytree import tree_leaves

from lit_rlhf.text.packing import divided
from lit_rlhf.training.parts import Part

Batch = TypeVar("Batch")


class BatchLoader(Generic[Batch]):
    """Batches of indices, collated; its place is saved and restored with a checkpoint.

    An epoch's order comes from ``order(epoch)`` alone, so an interrupted epoch goes on with the batch that would have
    come next; PyTorch's loader cannot do that. The order is cut into *global* batches of ``batch_size * shards``;
    process ``rank`` takes its part of each, so that n processes (or n accumulated micro-batches) see together what one
    process with an n times larger batch sees. ``collate(mine, everyones)`` gets the indices of this micro-batch and of
    the whole global batch: a mean over tokens or prompts is then the same however the batch is divided.

    Args:
        order: epoch -> indices of that epoch, in order.
        batch_size: sequences per process and micro-batch.
        collate: (indices of this micro-batch, indices of the global batch) -> batch.
        world_size, rank: of the processes.
        accumulate: micro-batches per optimizer step.
        cut: indices of a micro-batch -> those of the parts in which it is learned. One that is cut comes as a list of
            :class:`Part`.
        keep_rest: for evaluation: give the last, smaller batch too, which a training epoch drops, and begin anew each
            time, also where the last time was broken off. A process for which it has nothing reads one of its items to
            fill up (:meth:`fills_up`), so that all processes take equal numbers of steps.
    """

    def __init__(
        self,
        order: Callable[[int], Sequence[int]],
        batch_size: int,
        collate: Callable[[list[int], list[int]], Batch],
        *,
        world_size: int = 1,
        rank: int = 0,
        accumulate: int = 1,
        cut: Callable[[list[int]], list[list[int]]] = lambda mine: [mine],
        keep_rest: bool = False,
    ) -> None:
        self.cut = cut
        self.order, self.batch_size, self.collate = order, batch_size, collate
        self.world_size, self.rank, self.accumulate, self.keep_rest = world_size, rank, accumulate, keep_rest
        self.epoch = 0
        self.begun = 0  # items of this epoch that were given before the micro-batches are counted
        self.cursor = 0  # micro-batches of this epoch given since
        self._known: tuple[int, Sequence[int]] | None = None  # (epoch, its order)

    @property
    def global_batch(self) -> int:
        """Sequences that all processes and micro-batches see in one optimizer step."""
        return self.batch_size * self.world_size * self.accumulate

    @property
    def count(self) -> int:
        """Items of an epoch."""
        return len(self._order())

    def __len__(self) -> int:
        count, size = self.count, self.global_batch
        batches = -(-count // size) if self.keep_rest else count // size
        return batches * self.accumulate

    def __iter__(self) -> Iterator[Batch | list[Part[Batch]]]:
        if self.keep_rest:
            self.cursor = 0
        # As many as an epoch has, from its place on: an epoch of a trainer, which may take fewer, ends where it says.
        for _ in range(len(self)):
            # Lightning never asks a sized loader for the end of an epoch, so the next one begins here.
            if not self.keep_rest and self._place + self.global_batch > self.count:
                self.epoch, self.begun, self.cursor = self.epoch + 1, 0, 0
            step = self.cursor
            whole = list(self._order()[self._place :][: self.global_batch])
            part = (step % self.accumulate) * self.world_size + self.rank
            # Every shard has an equal share of a full batch; of a rest, what its stride hits.
            mine = whole[part :: self.world_size * self.accumulate] or whole[:1]
            # The place is moved before the batch is handed out: a checkpoint taken after its step goes on behind it.
            self.cursor = step + 1
            parts = divided(self.cut(mine), self._most_parts(whole, part - self.rank))
            if len(parts) > 1:
                yield [Part(self.collate(part, whole), len(part) / len(mine)) for part in parts]
            else:
                yield self.collate(mine, whole)

    def fills_up(self, step: int) -> bool:
        """Whether what this process reads in the ``step`` of an evaluation, from 0 on, belongs to another one."""
        return self.rank >= self.count - step * self.global_batch

    @property
    def _place(self) -> int:
        """Items of this epoch that were given before the optimizer step at hand."""
        return self.begun + self.cursor // self.accumulate * self.global_batch

    def _most_parts(self, whole: list[int], first: int) -> int:
        """Into how many parts a process cuts its micro-batch at most; ``first`` of the shards of ``whole`` is the first
        process's. Those whose models are sharded must take equally many."""
        if self.world_size == 1 or self.keep_rest:
            return 1
        shards = range(first, first + self.world_size)
        return max(len(self.cut(whole[shard :: self.world_size * self.accumulate])) for shard in shards)

    def _order(self) -> Sequence[int]:
        if self._known is None or self._known[0] != self.epoch:
            self._known = (self.epoch, self.order(self.epoch))
        return self._known[1]

    def state_dict(self) -> dict[str, Any]:
        """The place in items, which are the same for any number of processes."""
        return {"epoch": self.epoch, "items": self._place, "micro_batches": self.cursor % self.accumulate}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.begun, self.cursor = state["epoch"], state["items"], state["micro_batches"]


def sharding(trainer: Trainer | None) -> dict[str, int]:
    """Arguments of a :class:`BatchLoader` for training under ``trainer``."""
    return {} if trainer is None else {**dealing(trainer), "accumulate": trainer.accumulate_grad_batches}


def dealing(trainer: Trainer | None) -> dict[str, int]:
    """Arguments of a :class:`BatchLoader` for evaluation under ``trainer``."""
    return {} if trainer is None else {"world_size": trainer.world_size, "rank": trainer.global_rank}


def shuffled(size: int, seed: int, length: int | None = None) -> Callable[[int], list[int]]:
    """An order for :class:`BatchLoader`: each epoch fresh permutations of ``range(size)``, drawn from seed and epoch.

    As many of them as ``length`` indices take (default: one)."""
    length = size if length is None else length

    def order(epoch: int) -> list[int]:
        generator = seeded(seed, epoch)
        passes = [torch.randperm(size, generator=generator) for _ in range(-(-length // size))]
        return torch.cat(passes)[:length].tolist()

    return order


def mixed(
    sizes: Sequence[int], weights: Sequence[float], seed: int, length: int | None = None
) -> Callable[[int], list[int]]:
    """An order for :class:`BatchLoader` of several sources of ``sizes`` indices each, one behind the other.

    Each epoch has ``length`` indices (default: as many as there are), of each source its share by ``weights``: fresh
    permutations of it, as many as that takes, all shuffled together."""
    begins = [0, *accumulate(sizes)]
    length = begins[-1] if length is None else length
    counts = [max(1, round(length * weight / sum(weights))) for weight in weights]

    def order(epoch: int) -> list[int]:
        generator = seeded(seed, epoch)
        chosen = []
        for begin, size, count in zip(begins, sizes, counts):
            passes = [torch.randperm(size, generator=generator) for _ in range(-(-count // size))]
            chosen.append(begin + torch.cat(passes)[:count])
        return torch.cat(chosen)[torch.randperm(sum(counts), generator=generator)].tolist()

    return order


def in_order(size: int) -> Callable[[int], range]:
    """An order for :class:`BatchLoader`: ``range(size)`` in every epoch."""
    return lambda epoch: range(size)


def seeded(*numbers: int) -> Generator:
    """A random generator, on the CPU, that depends on ``numbers`` alone (a seed and a place, say)."""
    digest = hashlib.blake2b(",".join(str(int(number)) for number in numbers).encode(), digest_size=8).digest()
    return Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def largest(loaders: Any) -> Any:
    """The batch that holds most (tokens, above all) among the first of a loader, or of several."""
    loaders = loaders if isinstance(loaders, list) else [loaders]

    def size(batch: Any) -> int:
        return sum(x.numel() if isinstance(x, Tensor) else 1 for x in tree_leaves(batch))

    return max((batch for loader in loaders for batch in islice(loader, 64)), key=size)
