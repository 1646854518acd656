"""Facts of the world: animals and their attributes, drawn from a seed; sums; four topics of the real world."""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from lit_rlhf.text.world.phrases import PHRASES

VALUES: dict[str, list[str]] = PHRASES["values"]
ATTRIBUTES = tuple(VALUES)
N_ANIMALS, N_VALUES = 8, 4  # each value belongs to exactly two animals, so that a list is two names long
LARGEST_ADDEND = 4


def _by_topic(sentences: dict[str, dict[str, list[str]]]) -> dict[tuple[str, str], list[str]]:
    """(topic, audience) -> its sentences."""
    return {(topic, audience): said for topic, told in sentences.items() for audience, said in told.items()}


TOPICS, MYTHS = _by_topic(PHRASES["topics"]), _by_topic(PHRASES["myths"])  # what is true of a topic, and what is not


class Claim(NamedTuple):
    """One thing that is said: ("colour", "mog", "red"), ("sum", "2+4", "6"), ("event", "mog", "sang a song")."""

    what: str
    subject: str
    value: str


def sum_key(a: int, b: int) -> str:
    """The subject of a sum claim; 2 plus 4 and 4 plus 2 are the same sum."""
    return f"{min(a, b)}+{max(a, b)}"


class Facts:
    """The truth of the world with this seed.

    animals: eight names; values: attribute -> its four values; of: (animal, attribute) -> value."""

    def __init__(self, seed: int) -> None:
        rng = Random(f"facts {seed}")
        self.animals = tuple(rng.sample(PHRASES["animals"], N_ANIMALS))
        self.values = {attribute: tuple(rng.sample(pool, N_VALUES)) for attribute, pool in VALUES.items()}
        self.of: dict[tuple[str, str], str] = {}
        for attribute in ATTRIBUTES:
            dealt = rng.sample(self.values[attribute] * (N_ANIMALS // N_VALUES), N_ANIMALS)
            self.of |= {(animal, attribute): value for animal, value in zip(self.animals, dealt, strict=True)}

    def with_value(self, attribute: str, value: str) -> list[str]:
        """The two animals of which this value is true."""
        return [animal for animal in self.animals if self.of[animal, attribute] == value]

    def allows(self, claim: Claim) -> bool:
        """False for a claim that is untrue or harmful, whatever the question. Fiction and manners are never untrue."""
        what, subject, value = claim
        if what in VALUES:
            return self.of[subject, what] == value
        if what == "sum":
            a, b = subject.split("+")
            return int(a) + int(b) == int(value)
        return what not in ("myth", "harm")
