"""Demonstrations, packed; the loss is on the responses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from lit_rlhf.stages.examples import ExampleDataModule
from lit_rlhf.stages.prompts import SamplePrompt, sample_prompts
from lit_rlhf.stages.world import WithoutFiles, WorldFirst
from lit_rlhf.text.chat import Encoded, encode_dialogues
from lit_rlhf.text.packing import Packed, pack
from lit_rlhf.text.records import Demonstration, Messages, is_learned, parse_demonstration, text_of
from lit_rlhf.text.special_tokens import SpecialTokens


class SFTBatch(NamedTuple):
    """Dialogues, packed, and which of their tokens are learned."""

    packed: Packed
    learned: Tensor  # (M,) int64, flat indices into the rows of the tokens that count in the loss
    normalizer: float  # tokens learned in the whole optimizer step, divided by its number of micro-batches


def first_prompt(record: Demonstration) -> Messages:
    """The prompt of a dialogue for the split: everything before the first answer that is learned."""
    learned = next(i for i, m in enumerate(record.messages) if is_learned(m) and i >= record.context)
    return record.messages[:learned]


@dataclass(eq=False, repr=False, kw_only=True)
class SFTDataModule(ExampleDataModule):
    """Demonstrations from a file: prompt and response, instruction fields, or messages of several turns.

    Args:
        path: a file, a folder, a pattern (``data/*.jsonl``), a Hub name, or a list of them.
        tokenizer: one that is ready, or a function that trains one on the demonstrations.
        batch_size: dialogues per process and step; one whose template rewrites earlier turns counts once per turn.
        max_length: tokens; longer dialogues are handled as ``on_long`` says, and counted.
        on_long: "skip" leaves them out, "cut" keeps their first ``max_length`` tokens.
        packing: lay dialogues one after another (they do not see each other); False: pad all of a batch to its longest.
        held_out: fraction of the prompts kept for validation.
        split_seed: which ones; the same in every stage.
        special_tokens: what their names mean in the records: "plain" text; "refuse": a bad record; "rendered": tokens,
            as prompt and response were written by a chat template already, and none is applied.
        seed: order of the dialogues.
        limit: train on at most so many dialogues, to try things out; None: all.
        weights: share of each entry of ``path`` in what is trained on; None: each dialogue is read once in an epoch.
        cache: the folder that keeps records and tokens, which may then be more than memory holds; None: in memory.
        samples: held-out prompts that the model answers before, during and after training, for people to read.
        on_bad_record: "fail" names the first bad record, one that the template refuses too; "skip" counts them.
        fields: our name of a field -> its name in the file ("a.b": ``b`` inside ``a``), where it has others.
    """

    parse_record, asked = staticmethod(parse_demonstration), staticmethod(first_prompt)

    on_long: Literal["skip", "cut"] = "skip"
    special_tokens: SpecialTokens = "plain"
    samples: Annotated[int, Field(ge=1)] = 4

    called, example, limits_both = "dialogues", Encoded, True

    def texts(self, records: Sequence[Demonstration]) -> Iterator[str]:
        return (text_of(message) for record in records for message in record.messages)

    @property
    def sample_prompts(self) -> list[SamplePrompt]:
        """Held-out prompts that a model answers while it is trained."""
        asked = [(record.messages[:-1], record.tools) for record in self.val_records[: self.samples]]
        return sample_prompts(asked, self.tokenizer, self.special_tokens, self.note)

    def for_module(self) -> dict[str, Any]:
        return {**super().for_module(), "sample_prompts": self.sample_prompts, "note": self.note}

    def trained_records(self) -> Iterable[Demonstration]:
        """The dialogues that are trained on."""
        return self.train_records[: self.limit]

    def trained_prompts(self) -> Iterator[Messages]:
        """The prompt of each answer that is learned."""
        for record in self.trained_records():
            for i, message in enumerate(record.messages):
                if is_learned(message) and i >= record.context:
                    yield record.messages[:i]

    def encoded(self, records: Sequence[Demonstration], held_out: bool) -> list[Encoded]:
        kept = []
        messages, contexts, tools = zip(*((r.messages, r.context, r.tools) for r in records)) if records else [()] * 3
        settings = {
            "special_tokens": self.special_tokens,
            "refuse": lambda i, reason: self.refuse(records[i], reason),
            "note": self.note,
        }
        for item in chain(*encode_dialogues(self.tokenizer, messages, contexts, tools, **settings)):
            if len(item.tokens) > self.max_length:
                self.long += 1
                item = Encoded(item.tokens[: self.max_length], item.mask[: self.max_length])
                if self.on_long == "skip" or not any(item.mask[1:]):
                    self.left_out += 1
                    continue
            kept.append(item)
        return kept

    def sequences(self, item: Encoded) -> list[list[int]]:
        return [item.tokens]

    def collate(self, items: Sequence[Encoded], mine: list[int], everyones: list[int]) -> SFTBatch:
        chosen = [items[i] for i in mine]
        packed = pack([item.tokens for item in chosen], self.tokenizer.pad_token_id, padded=not self.packing)
        # The first token of a dialogue is predicted by nothing.
        offsets = [torch.tensor(item.mask[1:]).nonzero().squeeze(1) + 1 for item in chosen]
        learned = torch.cat([start + offset for start, offset in zip(packed.starts, offsets)])
        total = sum(sum(items[i].mask[1:]) for i in everyones)
        return SFTBatch(packed, learned, total * len(mine) / len(everyones))


@dataclass(eq=False, repr=False, kw_only=True)
class WorldSFTDataModule(WithoutFiles, SFTDataModule, WorldFirst):
    """Demonstrations of the built-in world, more than a third of them faulty, as people's are."""

    demonstrations: Annotated[int, Field(ge=16)] = 8000

    max_length: ClassVar[int] = 1024
    on_long: ClassVar[str] = "skip"

    def records(self) -> tuple[list[Demonstration], list[Demonstration]]:
        draw = self.world.demonstrations
        train = draw(self.demonstrations, self.split_seed, split="train", split_seed=self.split_seed)
        held_out = draw(400, self.split_seed, split="held_out", split_seed=self.split_seed)
        return [parse_demonstration(row) for row in train], [parse_demonstration(row) for row in held_out]
