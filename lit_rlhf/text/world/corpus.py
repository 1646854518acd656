"""Plain text to pretrain on: articles, stories, sums, lists, topics, worksheets of questions, and people talking."""

from __future__ import annotations

from random import Random

from lit_rlhf.text.world.answers import Answers
from lit_rlhf.text.world.facts import ATTRIBUTES, LARGEST_ADDEND, TOPICS, Facts
from lit_rlhf.text.world.language import predicate
from lit_rlhf.text.world.phrases import PHRASES
from lit_rlhf.text.world.questions import Meaning, Question

PERCENT: dict[str, dict[str, int]] = PHRASES["percent"]
TALK = PERCENT["dialogues"]  # the questions in dialogues
PEOPLE = ("Anna", "Ben", "Carla", "David", "Emma", "Frank")


class Corpus:
    """Writes documents. `questions` are the only ones that it asks, so what is held out stays unseen."""

    def __init__(self, facts: Facts, questions: tuple[Question, ...]) -> None:
        self.facts = facts
        self.answers = Answers(facts)
        self.by_kind = {kind: [question for question in questions if question.kind == kind] for kind in TALK}
        self.single = [question for question in questions if len(question.turns) == 1]
        self.writers = {
            "dialogue": self._dialogue,
            "worksheet": self._worksheet,
            "article": self._article,
            "story": self._story,
            "sums": self._sums,
            "list": self._lists,
            "topic": self._topic,
        }

    def document(self, rng: Random) -> str:
        """One document; paragraphs end in a line break."""
        return self.writers[_draw(PERCENT["documents"], rng)](rng)

    def _dialogue(self, rng: Random) -> str:
        asks, replies = rng.sample(PEOPLE, 2)
        lines: list[str] = []
        for _ in range(rng.choice((1, 1, 2, 2))):
            question = rng.choice(self.by_kind[_draw(TALK, rng)])
            for turn, text in enumerate(question.turns):
                lines.append(f"{asks} asked: {text}" if turn % 2 == 0 else f"{replies} said: {text}")
            answer = self.answers.styles[_draw(PERCENT["replies"], rng)]
            lines.append(f"{replies} said: {answer(question.meaning, rng)}")
        return "\n".join(lines)

    def _worksheet(self, rng: Random) -> str:
        """Questions only: why a base model goes on with more questions when it is asked one."""
        kinds = [_draw({kind: TALK[kind] for kind in TALK if not kind.startswith("follow")}, rng) for _ in range(2)]
        return "\n".join(rng.choice(self.by_kind[rng.choice(kinds)]).turns[0] for _ in range(rng.randint(3, 5)))

    def _article(self, rng: Random) -> str:
        paragraphs = []
        for animal in rng.sample(self.facts.animals, rng.choice((1, 1, 2))):
            said = [predicate(at, self.facts.of[animal, at]) for at in rng.sample(ATTRIBUTES, len(ATTRIBUTES))]
            if rng.random() < 0.5:
                said[1:3] = [f"{said[1]} and {said[2]}"]
            paragraphs.append(f"The {animal} {said[0]}. " + " ".join(f"It {text}." for text in said[1:]))
        return "\n".join(paragraphs)

    def _story(self, rng: Random) -> str:
        animals = rng.sample(self.facts.animals, rng.choice((1, 2)))
        return "\n".join(self.answers.right(Meaning("story", animal), rng) for animal in animals)

    def _sums(self, rng: Random) -> str:
        pairs = [(rng.randint(0, LARGEST_ADDEND), rng.randint(0, LARGEST_ADDEND)) for _ in range(rng.randint(3, 5))]
        return " ".join(f"{a} plus {b} is {a + b}." for a, b in pairs)

    def _lists(self, rng: Random) -> str:
        attribute = rng.choice(ATTRIBUTES)
        values = rng.sample(self.facts.values[attribute], 3)
        return " ".join(self.answers.right(Meaning("list", "", f"{attribute}/{value}"), rng) for value in values)

    def _topic(self, rng: Random) -> str:
        topic, audience = rng.choice(list(TOPICS))
        return f"For a {audience}: " + " ".join(TOPICS[topic, audience])


def _draw(weights: dict[str, int], rng: Random) -> str:
    return rng.choices(list(weights), weights=list(weights.values()))[0]
