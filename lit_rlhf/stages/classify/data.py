"""Labelled texts, multiple choice and pairs of similar texts, packed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from lit_rlhf.errors import UserError
from lit_rlhf.stages.examples import ExampleDataModule
from lit_rlhf.stages.world import WorldFirst, WorldTasks
from lit_rlhf.text.classifier_inputs import add_classifier_tokens, encode_inputs, input_texts
from lit_rlhf.text.packing import Packed, pack
from lit_rlhf.text.records import Labelled, MultipleChoice, Similarity, parse_labelled, task_prompt
from lit_rlhf.text.special_tokens import SpecialTokens

TaskKind = Literal["classification", "similarity", "choice"]


class ClassifyBatch(NamedTuple):
    """B examples in N inputs: one of a text, two of a pair, K of a question with K choices."""

    packed: Packed  # N inputs, each ending with the extract token
    example: Tensor  # (N,) int64, ascending: which example each input belongs to
    labels: Tensor  # (B,) int64, which label, or which choice
    learned: Tensor  # (M,) int64, flat indices into the rows of all tokens but each input's first
    normalizer: float  # such tokens in the whole optimizer step, divided by its number of micro-batches


class EncodedExample(NamedTuple):
    """One example as tokens."""

    inputs: list[list[int]]
    label: int


@dataclass(eq=False, repr=False, kw_only=True)
class ClassifyDataModule(ExampleDataModule):
    """Labelled records of one kind from a file.

    Args:
        path: a file, a folder, a pattern (``data/*.jsonl``), a Hub name, or a list of them: ``text`` + ``label``;
            ``premise`` + ``hypothesis`` + ``label``; ``text_a`` + ``text_b`` + ``label``; or ``context`` (or
            ``prompt``) + ``choices`` + ``label``.
        tokenizer: one that is ready, or a function that trains one on the texts.
        batch_size: examples per process and step.
        max_length: tokens per input; longer ones are handled as ``on_long`` says, and counted.
        on_long: "cut" drops the beginning of the first text, "skip" leaves the example out.
        packing: lay inputs one after another (they do not see each other); False: pad a batch to its longest.
        held_out: fraction of the records kept for validation, by their (first) text.
        split_seed: which ones; the same in every stage.
        seed: order of the examples.
        limit: train on at most so many examples, to try things out; None: all.
        weights: share of each entry of ``path`` in what is trained on; None: each record is read once in an epoch.
        cache: the folder that keeps records and tokens, which may then be more than memory holds; None: in memory.
        special_tokens: what their names mean in the records: "plain" text; "refuse": a bad record; "rendered": tokens.
        on_bad_record: "fail" names the first bad record, "skip" counts them.
        fields: our name of a field -> its name in the file ("a.b": ``b`` inside ``a``), where it has others.
    """

    parse_record, asked = staticmethod(parse_labelled), staticmethod(task_prompt)

    max_length: Annotated[int, Field(ge=8)] = 1024
    special_tokens: SpecialTokens = "plain"

    called, example = "records", EncodedExample

    def texts(self, records: Sequence[Labelled]) -> Iterator[str]:
        return (text for record in records for texts in input_texts(record) for text in texts)

    def prepare(self) -> None:
        kinds, labels = zip(*self.known_of(self.train_records, self.val_records))
        if len(set(kinds)) > 1:
            found = ", ".join(sorted(set(kinds)))
            raise UserError(f"{self.source}: holds records of several kinds ({found}); give a file of each")
        self.task: TaskKind = kinds[0]
        # Of a multiple choice only the right one is named; which place it stands at means nothing.
        self.labels = [] if self.task == "choice" else sorted(labels)
        if len(self.labels) == 1:
            raise UserError(f"{self.source}: all records have the label {self.labels[0]!r}; two or more were expected")
        add_classifier_tokens(self.tokenizer)

    def for_module(self) -> dict[str, Any]:
        return {**super().for_module(), "labels": self.labels, "task": self.task}

    @staticmethod
    def about(record: Labelled) -> tuple[TaskKind, str | None]:
        """The kind of a record, and its label where that means something."""
        if isinstance(record, MultipleChoice):
            return "choice", None
        return "similarity" if isinstance(record, Similarity) else "classification", record.label

    def encoded(self, records: Sequence[Labelled], held_out: bool) -> list[EncodedExample]:
        records = self.allowed(records, input_texts)
        texts = [input_texts(record) for record in records]
        flat = [pair for group in texts for pair in group]
        encoded = iter(encode_inputs(self.tokenizer, flat, self.max_length, self.special_tokens))
        kept = []
        for record, group in zip(records, texts):
            tokens, too_long = zip(*(next(encoded) for _ in group))
            self.long += any(too_long)
            if any(too_long) and self.on_long == "skip":
                continue
            label = record.answer if isinstance(record, MultipleChoice) else self.labels.index(record.label)
            kept.append(EncodedExample(list(tokens), label))
        return kept

    def sequences(self, item: EncodedExample) -> list[list[int]]:
        return item.inputs

    def collate(self, items: Sequence[EncodedExample], mine: list[int], everyones: list[int]) -> ClassifyBatch:
        chosen = [items[i] for i in mine]
        inputs = [r for item in chosen for r in item.inputs]
        packed = pack(inputs, self.tokenizer.pad_token_id, padded=not self.packing)
        # The first token of an input is predicted by nothing.
        learned = [torch.arange(a + 1, b + 1) for a, b in zip(packed.starts.tolist(), packed.ends.tolist())]
        total = sum(len(r) - 1 for i in everyones for r in items[i].inputs)
        return ClassifyBatch(
            packed,
            torch.tensor([i for i, item in enumerate(chosen) for _ in item.inputs]),
            torch.tensor([item.label for item in chosen]),
            torch.cat(learned),
            total * len(mine) / len(everyones),
        )


@dataclass(eq=False, repr=False, kw_only=True)
class WorldClassifyDataModule(WorldTasks, ClassifyDataModule, WorldFirst):
    """A labelled task of the built-in world.

    Args:
        task: "kind": what kind of question a text is; "truth": whether a claim is true, held out by the facts that it
            is about; "choice": which of four answers to a question is right; "same": do two questions ask the same.
        examples: different ones to train on, fewer where the world has no more.
    """

    task: Literal["kind", "truth", "choice", "same"] = "choice"

    max_length: ClassVar[int] = 1024
    on_long: ClassVar[str] = "cut"
