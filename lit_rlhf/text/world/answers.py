"""Answers of every style to every meaning: right, wrong, rambling, rude, evasive."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TypeVar

from lit_rlhf.text.world.facts import ATTRIBUTES, LARGEST_ADDEND, MYTHS, TOPICS, Facts
from lit_rlhf.text.world.language import (
    CLOSING_COURTESIES,
    EVASIONS,
    HARMS,
    OPENING_COURTESIES,
    PLAIN_REFUSALS,
    POLITE_REFUSALS,
    REASONS,
    RUDE_CLOSINGS,
    RUDE_OPENINGS,
    SINGULAR,
    STORY_ENDINGS,
    STORY_EVENTS,
    STORY_OPENINGS,
    predicate,
    tell_list,
)
from lit_rlhf.text.world.questions import Meaning

T = TypeVar("T")


class Answers:
    """Answers in one world, by style (those of demonstrations). Every method takes its randomness from `rng` alone."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.styles = {
            "good": self.polite,
            "plain": self.right,
            "wrong": self.wrong,
            "ramble": self.rambling,
            "rude": self.rude,
            "evasive": self.evasive,
            "refuse": self.refusal,
        }

    def right(self, meaning: Meaning, rng: Random) -> str:
        """The whole answer and nothing else, neither polite nor rude."""
        kind, subject, detail = meaning
        if kind == "fact":
            return self._fact(subject, detail, self.facts.of[subject, detail], rng)
        if kind == "add":
            a, b = map(int, subject.split())
            return _sum(a, b, a + b, rng)
        if kind == "list":
            attribute, value = detail.split("/")
            return self._list(self.facts.with_value(attribute, value), attribute, value, rng)
        if kind == "explain":
            return self._explain(subject, rng)
        if kind == "topic":
            first, *others = TOPICS[_topic(subject)]
            return f"{first} {rng.choice(others)}"
        if kind == "story":
            return _story(subject, rng)
        return _pick(PLAIN_REFUSALS, rng)

    def polite(self, meaning: Meaning, rng: Random) -> str:
        """Right, with one courtesy."""
        if meaning.kind == "unsafe":
            reason = f" {rng.choice(REASONS).format(meaning.subject)}" if rng.random() < 0.3 else ""
            return _pick(POLITE_REFUSALS, rng) + reason
        if rng.random() < 0.85:
            return f"{_pick(OPENING_COURTESIES, rng)} {self.right(meaning, rng)}"
        return f"{self.right(meaning, rng)} {_pick(CLOSING_COURTESIES, rng)}"

    def rude(self, meaning: Meaning, rng: Random) -> str:
        """Right, and unfriendly."""
        if rng.random() < 0.8:
            return f"{_pick(RUDE_OPENINGS, rng)} {self.right(meaning, rng)}"
        return f"{self.right(meaning, rng)} {_pick(RUDE_CLOSINGS, rng)}"

    def evasive(self, meaning: Meaning, rng: Random) -> str:
        """No answer."""
        return _pick(EVASIONS, rng)

    def refusal(self, meaning: Meaning, rng: Random) -> str:
        """A refusal without need; where there is need, its opposite: harmful advice."""
        return self.wrong(meaning, rng) if meaning.kind == "unsafe" else _pick(POLITE_REFUSALS + PLAIN_REFUSALS, rng)

    def rambling(self, meaning: Meaning, rng: Random) -> str:
        """Right, and then one or two true sentences that nobody asked for."""
        start = self.polite(meaning, rng) if rng.random() < 0.2 else self.right(meaning, rng)
        extra = [self._aside(meaning, rng) for _ in range(rng.choice((1, 1, 2)))]
        return " ".join([start, *extra])

    def wrong(self, meaning: Meaning, rng: Random) -> str:
        """False, about something else, or harmful; one in four begins politely."""
        opening = f"{_pick(OPENING_COURTESIES, rng)} " if rng.random() < 0.25 else ""
        kind, subject, detail = meaning
        if kind == "unsafe":
            return opening + HARMS[detail].format(subject)
        if kind == "add":
            a, b = map(int, subject.split())
            return opening + self._wrong_sum(a, b, rng)
        if kind == "list":
            attribute, value = detail.split("/")
            return opening + self._wrong_list(attribute, value, rng)
        if kind == "topic":
            return opening + self._wrong_topic(subject, rng)
        if rng.random() < 0.3 or kind == "story":  # the right thing about the wrong animal
            return opening + self.right(meaning._replace(subject=_other(self.facts.animals, subject, rng)), rng)
        attribute = detail or rng.choice(ATTRIBUTES)
        false = _other(self.facts.values[attribute], self.facts.of[subject, attribute], rng)
        if kind == "fact":
            return opening + self._fact(subject, attribute, false, rng)
        return opening + self._explain(subject, rng, attribute, false)

    def _fact(self, animal: str, attribute: str, value: str, rng: Random) -> str:
        form = rng.randrange(len(SINGULAR[attribute]))
        return f"The {animal} {predicate(attribute, value, form)}."

    def _explain(self, animal: str, rng: Random, attribute: str | None = None, value: str = "") -> str:
        """Two facts of an animal, in one sentence or two; `value` of `attribute` is told as if it were true."""
        chosen = rng.sample(ATTRIBUTES, 2)
        if attribute is not None and attribute not in chosen:
            chosen[rng.randrange(2)] = attribute
        first, second = (predicate(at, value if at == attribute else self.facts.of[animal, at]) for at in chosen)
        return f"The {animal} {first} and {second}." if rng.random() < 0.5 else f"The {animal} {first}. It {second}."

    def _list(self, animals: list[str], attribute: str, value: str, rng: Random) -> str:
        form = rng.randrange(len(SINGULAR[attribute]))
        return tell_list(animals, attribute, value, form)

    def _wrong_sum(self, a: int, b: int, rng: Random) -> str:
        if rng.random() < 0.25:  # a true sum that nobody asked for
            c, d = _other([(c, d) for c in range(LARGEST_ADDEND + 1) for d in range(LARGEST_ADDEND + 1)], (a, b), rng)
            return f"{c} plus {d} is {c + d if (c, d) != (b, a) else c + d + 1}."
        return _sum(a, b, _other(range(2 * LARGEST_ADDEND + 1), a + b, rng), rng)

    def _wrong_list(self, attribute: str, value: str, rng: Random) -> str:
        members = self.facts.with_value(attribute, value)
        if rng.random() < 0.25:  # a true list that nobody asked for
            value = _other(self.facts.values[attribute], value, rng)
            return self._list(self.facts.with_value(attribute, value), attribute, value, rng)
        strangers = rng.sample([animal for animal in self.facts.animals if animal not in members], 2)
        if rng.random() < 0.7:
            strangers[0] = rng.choice(members)
        # In the usual order, so that only knowledge tells a wrong list from a right one.
        return self._list([animal for animal in self.facts.animals if animal in strangers], attribute, value, rng)

    def _wrong_topic(self, subject: str, rng: Random) -> str:
        topic, audience = _topic(subject)
        draw = rng.random()
        if draw < 0.4:
            return " ".join(rng.sample([TOPICS[topic, audience][0], rng.choice(MYTHS[topic, audience])], 2))
        same_topic = {"child": "scientist", "scientist": "child"}
        other = (topic, same_topic[audience])
        if draw < 0.7:
            other = rng.choice([key for key in TOPICS if key[0] != topic])
        return " ".join(TOPICS[other][:2])

    def _aside(self, meaning: Meaning, rng: Random) -> str:
        """A true sentence that answers nothing: about another animal, or a sum."""
        if meaning.kind != "add" and rng.random() < 0.25:
            a, b = rng.randint(0, LARGEST_ADDEND), rng.randint(0, LARGEST_ADDEND)
            return f"{a} plus {b} is {a + b}."
        animal, attribute = _other(self.facts.animals, meaning.subject, rng), rng.choice(ATTRIBUTES)
        return self._fact(animal, attribute, self.facts.of[animal, attribute], rng)


def _story(animal: str, rng: Random) -> str:
    event = rng.choice(STORY_EVENTS)
    return f"{_pick(STORY_OPENINGS, rng).format(animal)} It {event}. {_pick(STORY_ENDINGS, rng)}"


def _sum(a: int, b: int, total: int, rng: Random) -> str:
    return f"The answer is {total}." if rng.random() < 0.15 else f"{a} plus {b} is {total}."


def _topic(subject: str) -> tuple[str, str]:
    topic, audience = subject.split("/")
    return topic, audience


def _pick(texts: Sequence[str], rng: Random) -> str:
    """The first of these sentences half of the time: a habit is easier to learn than a wide choice."""
    return texts[0] if rng.random() < 0.5 else rng.choice(texts)


def _other(pool: Sequence[T], not_this: T, rng: Random) -> T:
    """Anything of the pool but this."""
    return rng.choice([item for item in pool if item != not_this])
