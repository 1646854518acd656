"""Sources that never end, or that nobody wants to wait for: read as they are trained on, a window at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Generic, TypeVar

from lit_rlhf.errors import UserError

Record = TypeVar("Record")
Item = TypeVar("Item")

SHIFT = 32  # bits of an index that count within a window


class Windows(Sequence[Item], Generic[Record, Item]):
    """Items of a stream's records, window by window: index ``(n << SHIFT) + i`` is item i of window n.

    A stream that ends begins anew (one without records is a ``UserError``); an earlier window is found by reading it
    again from its beginning. Two windows are in memory at most.

    Args:
        read: gives the records from the beginning, the same ones each time.
        size: records of a window.
        make: what comes of the records of a window.
        name: of the source, in errors.
    """

    def __init__(
        self,
        read: Callable[[], Iterator[Record]],
        size: int,
        make: Callable[[list[Record]], Sequence[Item]],
        name: str,
    ) -> None:
        self.read, self.size, self.make, self.name = read, size, make, name
        self.furthest = 0  # window that was asked for
        self._held: dict[int, Sequence[Item]] = {}
        self._source: Iterator[Record] = iter(())
        self._next: int | None = None  # window that the source gives now

    def window(self, number: int) -> Sequence[Item]:
        """All items of a window. Raises ``UserError`` where it has none."""
        if number not in self._held:
            if self._next is None or number < self._next:
                self._source, self._next = self._endless(), 0
            for _ in islice(self._source, (number - self._next) * self.size):
                pass
            made = self.make(list(islice(self._source, self.size)))
            if not len(made):
                raise UserError(
                    f"{self.name}: records {number * self.size + 1} to {(number + 1) * self.size} leave nothing to "
                    "train on"
                )
            self._next, self.furthest = number + 1, max(number, self.furthest)
            self._held = {**dict([*self._held.items()][-1:]), number: made}
        return self._held[number]

    def __getitem__(self, index: int) -> Item:  # type: ignore[override]
        item: Item = self.window(index >> SHIFT)[index & (2**SHIFT - 1)]
        return item

    def __len__(self) -> int:
        return len(self.window(0))

    def _endless(self) -> Iterator[Record]:
        some = True
        while some:  # else it would be read for ever
            some = False
            for record in self.read():
                some = True
                yield record
        raise UserError(f"{self.name} ended, and nothing of it is left to train on beside what is held out")
