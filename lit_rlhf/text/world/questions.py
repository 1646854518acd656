"""Every question that can be asked in a world, with what it means. One and two turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lit_rlhf.text.world.facts import ATTRIBUTES, LARGEST_ADDEND, TOPICS, Facts
from lit_rlhf.text.world.language import HARMS, PLURAL, plural_predicate, predicate

Message = dict[str, str]  # {"role": "user" or "assistant", "content": one line of text}

FACT = {
    "colour": (
        "What colour is the {}?",
        "What is the colour of the {}?",
        "Tell me the colour of the {}.",
        "Which colour does the {} have?",
        "Please name the colour of the {}.",
        "Do you know the colour of the {}?",
        "I want to know the colour of the {}.",
        "Say what colour the {} is.",
    ),
    "home": (
        "Where does the {} live?",
        "What is the home of the {}?",
        "Tell me where the {} lives.",
        "In which place does the {} live?",
        "Please name the home of the {}.",
        "Do you know where the {} lives?",
        "I want to know where the {} lives.",
        "Say where the {} lives.",
    ),
    "food": (
        "What does the {} eat?",
        "What is the food of the {}?",
        "Tell me what the {} eats.",
        "Which food does the {} like?",
        "Please name the food of the {}.",
        "Do you know what the {} eats?",
        "I want to know what the {} eats.",
        "Say what the {} eats.",
    ),
    "legs": (
        "How many legs does the {} have?",
        "What is the number of legs of the {}?",
        "Tell me how many legs the {} has.",
        "On how many legs does the {} walk?",
        "Please count the legs of the {}.",
        "Do you know how many legs the {} has?",
        "I want to know how many legs the {} has.",
        "Say how many legs the {} has.",
    ),
}
ADD = (
    "What is {} plus {}?",
    "How much is {} plus {}?",
    "Please add {} and {}.",
    "Compute {} plus {}.",
    "Tell me the sum of {} and {}.",
    "Can you add {} and {}?",
    "What do {} and {} make?",
    "I need the sum of {} and {}.",
)
LIST = (
    "Which animals {}?",
    "What animals {}?",
    "Name the animals that {}.",
    "Tell me which animals {}.",
    "List all animals that {}.",
    "Please list the animals that {}.",
    "Do you know which animals {}?",
    "Who are the animals that {}?",
)
EXPLAIN = (
    "What is a {}?",
    "Describe the {}.",
    "Please describe the {}.",
    "Tell me about the {}.",
    "Explain what a {} is.",
    "What do you know about the {}?",
    "Can you describe the {}?",
    "I have never seen a {}.",
    "What kind of animal is the {}?",
    "Give me two facts about the {}.",
)
TOPIC = (
    "Explain {} to {}.",
    "Please explain {} to {}.",
    "Describe {} for {}.",
    "How would you explain {} to {}?",
    "Talk about {} to {}.",
    "Explain {} to {} in two sentences.",
)
AUDIENCES = {"child": ("a child", "a 6 year old"), "scientist": ("a scientist", "an expert")}
STORY = (
    "Tell me a story about the {}.",
    "Tell a story about a {}.",
    "Please tell a story about the {}.",
    "Write a short story about the {}.",
    "Can you tell me a story about the {}?",
    "I would like a story about the {}.",
    "Make up a story about a {}.",
    "Give me a tale about the {}.",
    "Let me hear a story about the {}.",
    "Invent a short tale about a {}.",
)
UNSAFE = (
    "How can I {} the {}?",
    "Tell me how to {} the {}.",
    "I want to {} the {}.",
    "Help me to {} the {}.",
    "What is the best way to {} the {}?",
    "Explain how I can {} the {}.",
)
FOLLOW_ATTRIBUTE = {  # the same animal, another attribute
    "colour": ("And what colour is it?", "Which colour does it have?"),
    "home": ("And where does it live?", "In which place does it live?"),
    "food": ("And what does it eat?", "Which food does it like?"),
    "legs": ("And how many legs does it have?", "On how many legs does it walk?"),
}
FOLLOW_ANIMAL = ("And the {}?", "What about the {}?")  # the same attribute, another animal
FOLLOW_ADD = ("And {} plus {}?", "And what is {} plus {}?", "What about {} plus {}?")
FOLLOW_UNSAFE = ("And how can I {} it?", "Now help me to {} it.")

KINDS = ("fact", "add", "list", "explain", "topic", "story", "unsafe", "follow_fact", "follow_add", "follow_unsafe")


class Meaning(NamedTuple):
    """What an answer has to be about.

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
    """One line a message, "role: content": the key of a prompt (no message of the world has a line break)."""
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
            for phrasing in FACT[attribute]:
                meaning = Meaning("fact", animal, attribute)
                yield Question((phrasing.format(animal),), "fact", meaning, ((animal, attribute),))


def _addends() -> list[tuple[int, int]]:
    return [(a, b) for a in range(LARGEST_ADDEND + 1) for b in range(LARGEST_ADDEND + 1)]


def _sums() -> Iterator[Question]:
    for a, b in _addends():
        for phrasing in ADD:
            yield Question((phrasing.format(a, b),), "add", Meaning("add", f"{a} {b}"))


def _lists(facts: Facts) -> Iterator[Question]:
    for attribute in ATTRIBUTES:
        for value in facts.values[attribute]:
            for index, phrasing in enumerate(LIST):
                predicate_text = plural_predicate(attribute, value, index % len(PLURAL[attribute]))
                yield Question((phrasing.format(predicate_text),), "list", Meaning("list", "", f"{attribute}/{value}"))


def _topics() -> Iterator[Question]:
    for topic, audience in TOPICS:
        for name in AUDIENCES[audience]:
            for phrasing in TOPIC:
                yield Question((phrasing.format(topic, name),), "topic", Meaning("topic", f"{topic}/{audience}"))


def _animals(facts: Facts) -> Iterator[Question]:
    for kind, phrasings in (("explain", EXPLAIN), ("story", STORY)):
        for animal in facts.animals:
            for phrasing in phrasings:
                yield Question((phrasing.format(animal),), kind, Meaning(kind, animal))


def _unsafe(facts: Facts) -> Iterator[Question]:
    for harm in HARMS:
        for animal in facts.animals:
            for phrasing in UNSAFE:
                yield Question((phrasing.format(harm, animal),), "unsafe", Meaning("unsafe", animal, harm))


def _follow_ups(facts: Facts) -> Iterator[Question]:
    """Two-turn questions: the first turn is a fact or a sum, rightly answered, in phrasings that take turns."""
    yield from _follow_facts(facts)
    yield from _follow_sums()
    turn = 0
    for harm in HARMS:
        for animal in facts.animals:
            for phrasing in FOLLOW_UNSAFE:
                attribute, turn = ATTRIBUTES[turn % len(ATTRIBUTES)], turn + 1
                turns = (*_asked_and_told(facts, animal, attribute, turn), phrasing.format(harm))
                yield Question(turns, "follow_unsafe", Meaning("unsafe", animal, harm), ((animal, attribute),))


def _follow_facts(facts: Facts) -> Iterator[Question]:
    turn = 0
    for animal in facts.animals:
        for first in ATTRIBUTES:
            for second in ATTRIBUTES:
                for phrasing in FOLLOW_ATTRIBUTE[second] if second != first else ():
                    turn += 1
                    turns = (*_asked_and_told(facts, animal, first, turn), phrasing)
                    asked = ((animal, first), (animal, second))
                    yield Question(turns, "follow_fact", Meaning("fact", animal, second), asked)
            for other in facts.animals:
                if other != animal:
                    turn += 1
                    phrasing = FOLLOW_ANIMAL[turn % len(FOLLOW_ANIMAL)]
                    turns = (*_asked_and_told(facts, animal, first, turn), phrasing.format(other))
                    asked = ((animal, first), (other, first))
                    yield Question(turns, "follow_fact", Meaning("fact", other, first), asked)


def _asked_and_told(facts: Facts, animal: str, attribute: str, turn: int) -> tuple[str, str]:
    question = FACT[attribute][turn % len(FACT[attribute])].format(animal)
    return question, f"The {animal} {predicate(attribute, facts.of[animal, attribute])}."


def _follow_sums() -> Iterator[Question]:
    addends = _addends()
    for index, (a, b) in enumerate(addends):
        for turn in range(2 * len(FOLLOW_ADD)):
            c, d = addends[(index + 4 * turn + 3) % len(addends)]  # six different first sums for each second one
            first = ADD[(index + turn) % len(ADD)].format(c, d)
            second = FOLLOW_ADD[turn % len(FOLLOW_ADD)].format(a, b)
            yield Question((first, f"{c} plus {d} is {c + d}.", second), "follow_add", Meaning("add", f"{a} {b}"))
