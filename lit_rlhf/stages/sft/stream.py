"""Demonstrations from a stream, which need not end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from lit_rlhf.stages.sft.data import SFTDataModule
from lit_rlhf.text.records import Demonstration, Seen, files_of, is_held_out, prompt_fingerprint, read_records
from lit_rlhf.text.records.stream import SHIFT, Windows
from lit_rlhf.training.batches import seeded


@dataclass(eq=False, repr=False, kw_only=True)
class StreamSFTDataModule(SFTDataModule):
    """Demonstrations that are read and tokenized as they are trained on: ``trainer.max_steps`` says how long.

    A window of dialogues is read, shuffled and trained on, then the next; a source that ends begins anew. A run that
    goes on reads up to its window again, without tokenizing it. Arguments as in :class:`SFTDataModule`, and

    Args:
        window: dialogues that are read at a time; they are in memory, in each process.
        validation: dialogues that are held out: the first ones of the part ``held_out`` of all prompts, of which
            nothing is trained on.
    """

    window: Annotated[int, Field(ge=1)] = 10_000
    validation: Annotated[int, Field(ge=1)] = 256

    ends = False
    limit: ClassVar[None] = None
    weights: ClassVar[None] = None
    cache: ClassVar[None] = None

    def records(self) -> tuple[list[Demonstration], list[Demonstration]]:
        """(the first window, held out)."""
        first, held_out = self._begin()
        if not (first and held_out):  # it has ended, and has few prompts: some change sides
            self.split([*self._side(held_out=False), *self._side(held_out=True)])
            first, held_out = self._begin()
        self.check_fields()
        return first, held_out

    def _begin(self) -> tuple[list[Demonstration], list[Demonstration]]:
        sides = ((False, self.window), (True, self.validation))
        first, held_out = (list(islice(self._side(out), count)) for out, count in sides)
        return first, held_out

    def encode(self) -> None:
        self.long = self.left_out = 0
        self.val_set = self.encoded(self.val_records, held_out=True)
        read, make = partial(self._side, held_out=False), partial(self.encoded, held_out=False)
        self.train_set = Windows(read, self.window, make, self.source)
        self.check_left(self.called, self.train_set, self.val_set)

    def sizes(self) -> dict[str, int]:
        return {"window": self.window, "val_set": len(self.val_set)}

    def longest(self) -> int:
        return self.max_length  # of what is still to come nobody knows

    def lengths(self, items: Sequence[Any]) -> Sequence[int]:
        return super().lengths(items if items is not self.train_set else self.train_set.window(0))

    def order(self, examples: Windows[Demonstration, Any], length: int | None = None) -> Callable[[int], list[int]]:
        def order(epoch: int) -> list[int]:
            places = torch.randperm(len(examples.window(epoch)), generator=seeded(self.seed, epoch))
            return ((epoch << SHIFT) + places).tolist()

        return order

    def trained_records(self) -> Iterator[Demonstration]:
        return islice(self._side(held_out=False), (self.train_set.furthest + 1) * self.window)

    def _side(self, held_out: bool) -> Iterator[Demonstration]:
        """The records of the stream, from its beginning, that are held out, or the others."""
        for file in files_of(self.path):
            seen = Seen()
            try:
                for record in read_records(file, self.parse_record, seen, self.on_bad_record, self.fields):
                    asked = self.asked(record)
                    fingerprint = prompt_fingerprint(asked)
                    out = is_held_out(asked, self.held_out, self.split_seed) or fingerprint in self.moved.held_out
                    stays = any(fingerprint in prints for prints in (self.moved.train, self.moved.trained))
                    if (out and not stays) == held_out:
                        yield record
            finally:  # who reads may stop before the end, and reads again
                known = set(self.skipped)
                self.skipped += [line for line in seen.skipped if line not in known]
                self.note_seen(file, seen)
