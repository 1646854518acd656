"""Held-out tasks as plain text, each behind k solved examples (GPT-3, section 2.4)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

import torch
from pydantic import Field

from lit_rlhf.errors import UserError
from lit_rlhf.stages.prompts import spread
from lit_rlhf.stages.records import RecordDataModule
from lit_rlhf.stages.world import WorldFirst, WorldTasks
from lit_rlhf.text.records import (
    LabelledText,
    Messages,
    MultipleChoice,
    OpenQuestion,
    Similarity,
    Task,
    parse_task,
    task_prompt,
)
from lit_rlhf.text.special_tokens import SpecialTokens, encode_behind, encode_texts, text_start
from lit_rlhf.text.world import TaskName
from lit_rlhf.training.batches import BatchLoader, dealing, in_order, seeded


class Shot(NamedTuple):
    """A task as plain text."""

    question: str
    choices: tuple[str, ...]  # what it is answered with; empty: anything
    answers: tuple[str, ...]  # what is right; of choices, the one

    @property
    def solution(self) -> str:
        """The solution of the task, where it is an example."""
        return self.answers[0]


class ShotBatch(NamedTuple):
    """B held-out tasks, each behind the same number of examples."""

    shots: int  # examples before each task
    tasks: list[Shot]
    prompts: list[list[int]]  # tokens up to where the answer begins
    choices: list[list[list[int]]]  # tokens of each choice of each task; none where the answer is open
    texts: list[str]  # of the prompts


@dataclass(eq=False, repr=False, kw_only=True)
class FewShotDataModule(RecordDataModule):
    """Tasks of one kind from a file; the held-out ones are asked, the others serve as examples.

    Args:
        path: a file, a folder, a pattern (``data/*.jsonl``), a Hub name, or a list of them: records as for
            ``stage=classify``, or ``prompt`` + ``answers`` (or ``response``).
        tokenizer: of the model that is asked.
        shots: numbers of examples before a task.
        template: how a task is written; ``{question}`` and, last, ``{answer}``.
        separator: what stands between examples.
        instruction: what stands before the first example; "": nothing.
        batch_size: tasks per batch.
        held_out: fraction of the records that are asked, by their (first) text.
        limit_held_out: at most so many of them; None: all.
        limit: examples are drawn from at most so many records; None: all.
        split_seed: which ones are held out; the same in every stage.
        seed: which examples stand before which task; those of k are among those of more.
        special_tokens: what their names mean in the records: "plain" text; "refuse": a bad record; "rendered": tokens.
        on_bad_record: "fail" names the first bad record, "skip" counts them.
        fields: our name of a field -> its name in the file ("a.b": ``b`` inside ``a``), where it has others.
    """

    shots: Sequence[Annotated[int, Field(ge=0)]] = (0, 1, 4, 8, 16, 32)
    template: str = "{question}\n{answer}"
    separator: str = "\n\n"
    instruction: str = ""
    limit_held_out: Annotated[int, Field(ge=1)] | None = None
    special_tokens: SpecialTokens = "plain"

    cache: ClassVar[None] = None
    parse_record, asked = staticmethod(parse_task), staticmethod(task_prompt)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.shots, template = sorted(set(self.shots)), self.template
        self.train_set: list[Shot] = []
        if template.count("{question}") != 1 or template.count("{answer}") != 1 or not template.endswith("{answer}"):
            raise UserError(
                f"template={template!r} (few_shot.data): it needs {{question}} once and {{answer}} once, at its end"
            )
        if not self.shots:
            raise UserError("shots=[] (few_shot.data): give one or more numbers of examples, 0 among them say")

    def setup(self, stage: str | None = None) -> None:
        if self.train_set:
            return
        train, held_out = (self.allowed(side, lambda task: as_shot(task, ())) for side in self.records())
        open_ended = [isinstance(task, OpenQuestion) for task in (*train, *held_out)]
        if any(open_ended) and not all(open_ended):
            raise UserError(f"{self.source}: holds open questions and others; give a file of each")
        self.task = "exact match" if open_ended[0] else "choice"
        labels = tuple(sorted({t.label for t in (*train, *held_out) if isinstance(t, LabelledText | Similarity)}))
        self.train_set = [as_shot(task, labels) for task in train[: self.limit]]
        self.held_out_tasks = spread(held_out, self.limit_held_out)
        self.val_set = [as_shot(task, labels) for task in self.held_out_tasks]
        self.shots, too_many = self._drawable()
        if too_many:
            asked = ", ".join(map(str, too_many))
            self.note(
                f"few_shot.data.shots: {asked} examples are more than the {len(self.train_set)} that there are to draw "
                "from, and were left out"
            )
        self._before, self._space = _split_space(self.template.removesuffix("{answer}"))

    def sizes(self) -> dict[str, int]:
        return {"train_set": len(self.train_set), "val_set": len(self.val_set)}

    def _drawable(self) -> tuple[list[int], list[int]]:
        """(numbers of examples that can be drawn, the others)."""
        drawable = [shots for shots in self.shots if shots <= len(self.train_set)]
        if not drawable:
            raise UserError(
                f"shots (few_shot.data): {self.shots[0]} examples are asked for, and there are {len(self.train_set)} "
                "to draw from"
            )
        return drawable, self.shots[len(drawable) :]

    def evaluated_prompts(self) -> Iterator[Messages]:
        """The prompts that the model may not have been trained on."""
        yield from map(task_prompt, self.held_out_tasks)

    def prompt(self, place: int, shots: int) -> str:
        """The text of a held-out task behind ``shots`` examples, up to where its answer begins."""
        order = torch.randperm(len(self.train_set), generator=seeded(self.seed, place))[:shots].tolist()
        examples = [self._written(self.train_set[i]) for i in order]
        question = self._before.replace("{question}", self.val_set[place].question)
        return self.separator.join([*filter(None, [self.instruction]), *examples, question])

    def _written(self, shot: Shot) -> str:
        before, after = self.template.removesuffix("{answer}").split("{question}")
        return before + shot.question + after + shot.solution

    def _collate(self, shots: int, places: list[int]) -> ShotBatch:
        tasks = [self.val_set[i] for i in places]
        # As the tokenizer begins a text, or as in pretraining behind end-of-text (or the model's own first token).
        first = self.tokenizer.bos_token_id
        first = self.tokenizer.eos_token_id if first is None else first
        start = text_start(self.tokenizer) or [first]
        texts = [self.prompt(i, shots) for i in places]
        meant: SpecialTokens = "rendered" if self.special_tokens == "rendered" else "plain"  # records are checked
        prompts = [[*start, *tokens] for tokens in encode_texts(self.tokenizer, texts, meant)]
        # A model's words carry the space before them: it belongs to the answer.
        answers = [self._space + choice for task in tasks for choice in task.choices]
        choices = iter(encode_behind(self.tokenizer, answers, meant))
        return ShotBatch(shots, tasks, prompts, [[next(choices) for _ in task.choices] for task in tasks], texts)

    def test_dataloader(self) -> list[BatchLoader[ShotBatch]]:
        """A loader for each number of examples."""

        def loader(shots: int) -> BatchLoader[ShotBatch]:
            collate = lambda mine, _: self._collate(shots, mine)  # noqa: E731
            order, deal = in_order(len(self.val_set)), dealing(self.trainer)
            return BatchLoader(order, self.batch_size, collate, keep_rest=True, **deal)

        return [loader(shots) for shots in self.shots]


def as_shot(task: Task, labels: tuple[str, ...]) -> Shot:
    """A record as plain text; a label is answered with its name."""
    if isinstance(task, MultipleChoice):
        return Shot(task.context, task.choices, (task.choices[task.answer],))
    if isinstance(task, OpenQuestion):
        return Shot(task.question, (), task.answers)
    texts = task.texts if isinstance(task, LabelledText) else (task.text_a, task.text_b)
    return Shot("\n".join(texts), labels, (task.label,))


def _split_space(text: str) -> tuple[str, str]:
    """(text, the spaces that it ended with)."""
    stripped = text.rstrip(" ")
    return stripped, text[len(stripped) :]


@dataclass(eq=False, repr=False, kw_only=True)
class WorldFewShotDataModule(WorldTasks, FewShotDataModule, WorldFirst):
    """A task of the built-in world: "kind", "truth", "choice" and "same" as in ``stage=classify``; "answer" is open."""

    task: TaskName = "choice"
    template: str = "Anna asked: {question}\nBen said: {answer}"
    separator: str = "\n"
    limit_held_out: Annotated[int, Field(ge=1)] | None = 200
