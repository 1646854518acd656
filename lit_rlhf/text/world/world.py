"""The built-in world: facts, questions, answers, grades and text, all drawn from seeds."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Literal, TypeVar

from lit_rlhf.errors import UserError
from lit_rlhf.text.world.answers import Answers
from lit_rlhf.text.world.corpus import Corpus
from lit_rlhf.text.world.facts import Facts
from lit_rlhf.text.world.grading import Grade, Grader
from lit_rlhf.text.world.language import OPENING_COURTESIES, POLITE_REFUSALS
from lit_rlhf.text.world.phrases import PHRASES
from lit_rlhf.text.world.questions import Message, Question, all_questions, conversation_text
from lit_rlhf.text.world.splits import Split, make_split
from lit_rlhf.text.world.tasks import TaskName, task_rows

MIXTURE: dict[str, int] = PHRASES["percent"]["prompts"]  # that people ask, by kind
SplitName = Literal["train", "held_out"]


@dataclass(frozen=True)
class WorldPrompt:
    """A prompt; two are equal when their texts are.

    messages: user, or user, assistant, user; kind: see MIXTURE; transfer: asks for an (animal, attribute) pair that no
    training prompt asks for."""

    messages: tuple[Message, ...] = field(compare=False)
    kind: str = field(compare=False)
    transfer: bool = field(compare=False)
    text: str  # the messages, one line each: "role: content"


Item = TypeVar("Item", Question, WorldPrompt)


def world_fingerprint() -> str:
    """Of the code and the phrases that make worlds: others make other texts of the same seed."""
    files = [file for file in Path(__file__).parent.iterdir() if file.suffix in (".py", ".yaml")]
    code = b"".join(file.read_bytes() for file in sorted(files))
    return hashlib.sha256(code).hexdigest()[:16]


class World:
    """A small world, drawn from `seed`. What its methods return depends on their arguments alone."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.facts = Facts(seed)
        self.answers = Answers(self.facts)
        self.grader = Grader(self.facts)
        self.questions = {question.text: question for question in all_questions(self.facts)}
        self._splits: dict[int, Split] = {}

    def corpus(self, n: int, seed: int, split_seed: int = 0) -> list[str]:
        """n documents of plain text to pretrain on. No held-out prompt of the split appears in them."""
        split, rng = self.split(split_seed), Random(f"corpus {self.seed} {seed}")
        hidden = frozenset(question.turns for question in split.held_out)
        # Transfer pairs may be talked about, in other words than the held-out ones: how else could they be known?
        open_questions = [q for q in self.questions.values() if q.turns not in hidden and q.turns[:1] not in hidden]
        corpus = Corpus(self.facts, tuple(open_questions))
        return [corpus.document(rng) for _ in range(n)]

    def prompts(self, split: SplitName, split_seed: int = 0) -> list[WorldPrompt]:
        """All distinct prompts of one side of the split."""
        transfer = self.split(split_seed).transfer
        return [
            WorldPrompt(q.messages, q.kind, not transfer.isdisjoint(q.asked), q.text)
            for q in self._side(split, split_seed)
        ]

    def sample_prompts(self, n: int, seed: int, split: SplitName = "train", split_seed: int = 0) -> list[WorldPrompt]:
        """n prompts drawn with replacement: first a kind by MIXTURE, then a prompt of that kind."""
        rng = Random(f"prompts {self.seed} {seed} {split}")
        return _sample_by_kind(self.prompts(split, split_seed), n, rng)

    def demonstrations(
        self, n: int, seed: int, split: SplitName = "train", split_seed: int = 0
    ) -> list[dict[str, object]]:
        """n records: prompt (messages), response, kind, style (good, plain, wrong, ramble, rude, evasive, refuse)."""
        rng = Random(f"demonstrations {self.seed} {seed} {split}")
        questions = _sample_by_kind(self._side(split, split_seed), n, rng)
        return [demonstration(self.answers, question, rng) for question in questions]

    def tasks(
        self, task: TaskName, n: int, seed: int, split: SplitName = "train", split_seed: int = 0
    ) -> list[dict[str, object]]:
        """Up to n different labelled records of a task, fewer where the world has no more.

        kind: text and what kind of question it is; truth: a claim, true or false (held-out claims are about other
        facts); choice: a question, four answers, which one is right; same: whether two questions ask the same;
        answer: a question and its right answers."""
        rng = Random(f"task {task} {self.seed} {seed} {split}")
        questions, known = self._side(split, split_seed), self._side("train", split_seed)
        return task_rows(task, self.facts, questions, known, n, rng, split == "held_out", split_seed)

    def grade(self, prompt: Sequence[Message] | str, response: str, truncated: bool = False) -> Grade:
        """The gold grade of an answer. A prompt that is a string is one user message.

        truncated: cut off by the length limit. Raises ValueError for a prompt that is not of this world."""
        return self.grader.grade(self.question(prompt).meaning, response, truncated)

    def best_answer(self, prompt: Sequence[Message] | str) -> str:
        """An answer that no other one beats: right, polite, short."""
        meaning = self.question(prompt).meaning
        if meaning.kind == "unsafe":
            return POLITE_REFUSALS[0]
        return f"{OPENING_COURTESIES[0]} {self.answers.right(meaning, Random(0))}"

    def question(self, prompt: Sequence[Message] | str) -> Question:
        """The question of a prompt, with its meaning."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text = conversation_text(messages)
        if text not in self.questions:
            shown = text if len(text) <= 120 else text[:117] + "..."
            raise UserError(
                f"The built-in world (seed {self.seed}) does not know the prompt {shown!r}, so it cannot grade its "
                "answers: give a prompt of this world, or judge with a reward model or a person instead."
            )
        return self.questions[text]

    def split(self, split_seed: int) -> Split:
        """The split of this seed, made once."""
        if split_seed not in self._splits:
            self._splits[split_seed] = make_split(self.facts, list(self.questions.values()), split_seed)
        return self._splits[split_seed]

    def _side(self, split: SplitName, split_seed: int) -> tuple[Question, ...]:
        if split not in ("train", "held_out"):
            raise ValueError(f"split is {split!r}: give 'train' or 'held_out'.")
        sides = self.split(split_seed)
        return sides.train if split == "train" else sides.held_out


def demonstration(answers: Answers, question: Question, rng: Random) -> dict[str, object]:
    """A demonstration as people write them: mostly right answers, many with faults that later stages can remove."""
    percent = PHRASES["percent"]["demonstrations"]
    style = rng.choices(list(percent), weights=list(percent.values()))[0]
    response = answers.styles[style](question.meaning, rng)
    return {"prompt": list(question.messages), "response": response, "kind": question.kind, "style": style}


def _sample_by_kind(items: Sequence[Item], n: int, rng: Random) -> list[Item]:
    """n draws with replacement: first a kind by MIXTURE, then one item of that kind."""
    by_kind = {kind: [item for item in items if item.kind == kind] for kind in MIXTURE}
    kinds = rng.choices(list(MIXTURE), weights=list(MIXTURE.values()), k=n)
    return [rng.choice(by_kind[kind]) for kind in kinds]
