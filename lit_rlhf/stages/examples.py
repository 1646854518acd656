"""Records that become examples, tokens to learn from: what the data of SFT, rankings and classification share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from transformers import PreTrainedTokenizerBase

from lit_rlhf.stages.records import RecordDataModule
from lit_rlhf.text.chat import ensure_chat_template
from lit_rlhf.text.packing import runs
from lit_rlhf.training.batches import BatchLoader, dealing, in_order, sharding
from lit_rlhf.training.parts import DataInParts


@dataclass(eq=False, repr=False, kw_only=True)
class ExampleDataModule(RecordDataModule, DataInParts):
    """Batches of the examples in ``train_set``, shuffled, and of those in ``val_set``, in order.

    Arguments as in :class:`RecordDataModule`, and

    Args:
        max_length: tokens; longer examples are handled as ``on_long`` says, and counted.
        on_long: "skip" leaves them out, "cut" shortens them.
        packing: lay sequences one after another (they do not see each other); False: pad a batch to its longest.
        weights: share of each entry of ``path`` in what is trained on, of any sum; where ``path`` is no list, of each
            of its files. None: each record is read once in an epoch.
    """

    max_length: Annotated[int, Field(ge=2)] = 1024
    on_long: Literal["skip", "cut"] = "cut"
    packing: bool = True
    weights: list[Annotated[float, Field(gt=0)]] | None = None

    limits_both: ClassVar[bool] = False  # whether ``limit`` is also one of what is held out
    called: ClassVar[str]  # what an example is, in a message

    def __post_init__(self) -> None:
        super().__post_init__()
        self.train_set: Sequence[Any] = []

    def texts(self, records: Sequence[Any]) -> Iterable[str]:
        """Texts that a tokenizer is trained on."""
        raise NotImplementedError

    def prepare(self) -> None:
        """Give the tokenizer what it lacks, once ``train_records`` and ``val_records`` are known."""
        ensure_chat_template(self.tokenizer)

    def collate(self, items: Sequence[Any], mine: list[int], everyones: list[int]) -> Any:
        """The batch of the items ``mine`` of a micro-batch, out of ``everyones`` of the optimizer step."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        if self.train_set:
            return
        self.train_records, self.val_records = self.records()
        if not isinstance(self.tokenizer, PreTrainedTokenizerBase):
            self.tokenizer = self.tokenizer(self.texts(self.train_records))
        self.prepare()
        self.encode()

    def encode(self) -> None:
        self.long = self.left_out = 0
        self.train_set = self.examples_of(self.train_records[: self.limit], held_out=False)
        self.val_set = self.examples_of(self.val_records[: self.limit if self.limits_both else None], held_out=True)
        self.check_left(self.called, self.train_set, self.val_set)

    def sizes(self) -> dict[str, int]:
        """Examples to train on and held out."""
        return {"train_set": len(self.train_set), "val_set": len(self.val_set)}

    def longest(self) -> int:
        return max(map(self.longest_of, (self.train_set, self.val_set)))

    def train_dataloader(self) -> BatchLoader[Any]:
        shards = sharding(self.trainer)
        most = len(self.train_set) // shards.get("world_size", 1)  # that each process can have as many of
        if self.batch_size > most > 0:
            count = f"{len(self.train_set)} {self.called}"
            each = f", each of {shards['world_size']} processes {most}" if most < len(self.train_set) else ""
            self.note(f"batch_size={self.batch_size} is more than the {count} to train on: a batch has them all{each}")

        def cut(mine: list[int]) -> list[list[int]]:
            return [mine[run] for run in runs(self.lengths([self.train_set[i] for i in mine]), self.learned_at_once)]

        return BatchLoader(
            self.order(self.train_set),
            min(self.batch_size, max(1, most)),
            lambda mine, everyones: self.collate(self.train_set, mine, everyones),
            cut=cut,
            **shards,
        )

    def val_dataloader(self) -> BatchLoader[Any]:
        batches = runs(self.lengths(self.val_set), self.read_at_once, 4 * self.batch_size)
        indices = [list(range(len(self.val_set))[batch]) for batch in batches]
        return BatchLoader(
            in_order(len(batches)),
            1,
            lambda mine, _: self.collate(self.val_set, indices[mine[0]], indices[mine[0]]),
            keep_rest=True,
            **dealing(self.trainer),
        )
