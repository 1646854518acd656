"""Every question that can be asked in a world, with what it means. One and two turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lit_rlhf.text.world.facts import ATTRIBUTES, LARGEST_ADDEND, TOPICS, Facts
from lit_rlhf.text.world.language import HARMS, PLURAL, plural_predicate, predicate
from lit_rlhf.text.world.phrases import PHRASES

Message = dict[str, str]  # {"role": "user" or "assistant", "content": one line of text}

ASKED: dict[str, Any] = PHRASES["questions"]  # how each kind of question is asked


class Meaning(NamedTuple):
    """The meaning of a question: what an answer has to be about.

    kind: one of the seven one-turn kinds; subject: an animal, "rain/child", or "2 4" for a sum; detail: the
    attribute of a fact, the harm of an unsafe question, "colour/red" of a list; empty where there is none."""

    kind: str
    subject: str
    detail: str = ""

    @property
    def animal(self) -> str | None:
        """The animal that "it" stands for when the answer itself names none."""
        return self.subject if self.kind in ("fact", "explain", "story", "unsafe") else None


@dataclass(frozen=True)
class Question:
    """turns: what user, assistant, user, ... said; asked: the (animal, attribute) pairs that any turn asks for."""

    turns: tuple[str, ...]
    kind: str
    meaning: Meaning
    asked: tuple[tuple[str, str], ...] = ()

    @property
    def messages(self) -> tuple[Message, ...]:
        roles = ("user", "assistant") * len(self.turns)
        return tuple({"role": role, "content": turn} for role, turn in zip(roles, self.turns, strict=False))

    @property
    def text(self) -> str:
        return conversation_text(self.messages)


def conversation_text(messages: Sequence[Message]) -> str:
    """One line per message, "role: content": the key of a prompt (no message of the world has a line break)."""
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def all_questions(facts: Facts) -> list[Question]:
    """Every question of the world, in a fixed order."""
    return [
        *_facts(facts),
        *_sums(),
        *_lists(facts),
        *_topics(),
        *_animals(facts),
        *_unsafe(facts),
        *_follow_ups(facts),
    ]


def _facts(facts: Facts) -> Iterator[Question]:
    for animal in facts.animals:
        for attribute in ATTRIBUTES:
            for phrasing in ASKED["fact"][attribute]:
                meaning = Meaning("fact", animal, attribute)
                yield Question((phrasing.format(animal),), "fact", meaning, ((animal, attribute),))


def _addends() -> list[tuple[int, int]]:
    return [(a, b) for a in range(LARGEST_ADDEND + 1) for b in range(LARGEST_ADDEND + 1)]


def _sums() -> Iterator[Question]:
    for a, b in _addends():
        for phrasing in ASKED["add"]:
            yield Question((phrasing.format(a, b),), "add", Meaning("add", f"{a} {b}"))


def _lists(facts: Facts) -> Iterator[Question]:
    for attribute in ATTRIBUTES:
        for value in facts.values[attribute]:
            for index, phrasing in enumerate(ASKED["list"]):
                predicate_text = plural_predicate(attribute, value, index % len(PLURAL[attribute]))
                yield Question((phrasing.format(predicate_text),), "list", Meaning("list", "", f"{attribute}/{value}"))


def _topics() -> Iterator[Question]:
    for topic, audience in TOPICS:
        for name in PHRASES["audiences"][audience]:
            for phrasing in ASKED["topic"]:
                yield Question((phrasing.format(topic, name),), "topic", Meaning("topic", f"{topic}/{audience}"))


def _animals(facts: Facts) -> Iterator[Question]:
    for kind, phrasings in (("explain", ASKED["explain"]), ("story", ASKED["story"])):
        for animal in facts.animals:
            for phrasing in phrasings:
                yield Question((phrasing.format(animal),), kind, Meaning(kind, animal))


def _unsafe(facts: Facts) -> Iterator[Question]:
    for harm in HARMS:
        for animal in facts.animals:
            for phrasing in ASKED["unsafe"]:
                yield Question((phrasing.format(harm, animal),), "unsafe", Meaning("unsafe", animal, harm))


def _follow_ups(facts: Facts) -> Iterator[Question]:
    """Two-turn questions: the first turn is a fact or a sum, rightly answered, in phrasings that take turns."""
    yield from _follow_facts(facts)
    yield from _follow_sums()
    turn = 0
    for harm in HARMS:
        for animal in facts.animals:
            for phrasing in ASKED["follow_unsafe"]:
                attribute, turn = ATTRIBUTES[turn % len(ATTRIBUTES)], turn + 1
                turns = (*_asked_and_told(facts, animal, attribute, turn), phrasing.format(harm))
                yield Question(turns, "follow_unsafe", Meaning("unsafe", animal, harm), ((animal, attribute),))


def _follow_facts(facts: Facts) -> Iterator[Question]:
    turn = 0
    for animal in facts.animals:
        for first in ATTRIBUTES:
            for second in ATTRIBUTES:
                for phrasing in ASKED["follow_attribute"][second] if second != first else ():
                    turn += 1
                    turns = (*_asked_and_told(facts, animal, first, turn), phrasing)
                    asked = ((animal, first), (animal, second))
                    yield Question(turns, "follow_fact", Meaning("fact", animal, second), asked)
            for other in facts.animals:
                if other != animal:
                    turn += 1
                    phrasing = ASKED["follow_animal"][turn % len(ASKED["follow_animal"])]
                    turns = (*_asked_and_told(facts, animal, first, turn), phrasing.format(other))
                    asked = ((animal, first), (other, first))
                    yield Question(turns, "follow_fact", Meaning("fact", other, first), asked)


def _asked_and_told(facts: Facts, animal: str, attribute: str, turn: int) -> tuple[str, str]:
    question = ASKED["fact"][attribute][turn % len(ASKED["fact"][attribute])].format(animal)
    return question, f"The {animal} {predicate(attribute, facts.of[animal, attribute])}."


def _follow_sums() -> Iterator[Question]:
    addends = _addends()
    for index, (a, b) in enumerate(addends):
        for turn in range(2 * len(ASKED["follow_add"])):
            c, d = addends[(index + 4 * turn + 3) % len(addends)]  # six different first sums for each second one
            first = ASKED["add"][(index + turn) % len(ASKED["add"])].format(c, d)
            second = ASKED["follow_add"][turn % len(ASKED["follow_add"])].format(a, b)
            yield Question((first, f"{c} plus {d} is {c + d}.", second), "follow_add", Meaning("add", f"{a} {b}"))
