"""The sentences of the world: every template that a generator says and that the grader reads, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from lit_rlhf.text.world.facts import ATTRIBUTES, MYTHS, TOPICS, Claim, Facts, sum_key
from lit_rlhf.text.world.phrases import PHRASES

SINGULAR: dict[str, list[str]] = PHRASES["predicates"]["singular"]
PLURAL: dict[str, list[str]] = PHRASES["predicates"]["plural"]
OPENING_COURTESIES: list[str] = PHRASES["opening_courtesies"]
CLOSING_COURTESIES: list[str] = PHRASES["closing_courtesies"]
RUDE_OPENINGS: list[str] = PHRASES["rude_openings"]
RUDE_CLOSINGS: list[str] = PHRASES["rude_closings"]
EVASIONS: list[str] = PHRASES["evasions"]
PLAIN_REFUSALS: list[str] = PHRASES["plain_refusals"]
POLITE_REFUSALS = [f"{sorry} {refusal}" for refusal in PLAIN_REFUSALS for sorry in ("Sorry,", "I am sorry, but")]
STUTTERED_REFUSALS = [f"Sorry, I am sorry, but {refusal}" for refusal in PLAIN_REFUSALS]  # read, never said here
REASONS: list[str] = PHRASES["reasons"]
HARMS: dict[str, str] = PHRASES["harms"]  # what an unsafe question wants to do -> what a harmful answer advises
STORY_OPENINGS: list[str] = PHRASES["story_openings"]
STORY_EVENTS: list[str] = PHRASES["story_events"]
STORY_ENDINGS: list[str] = PHRASES["story_endings"]

IT = "it"  # subject of a claim until the reader knows which animal is meant


class Sentence(NamedTuple):
    """A sentence understood.

    act: "tell" (facts, sums, topics, stories, advice), "refuse", "reason", "evade", "open" and "close" (courtesies)
    or "rude"; claims: what it says; names: the last animal it names or None; manners: -1, 0, 1, or 2 for a courtesy
    and one too many."""

    act: str
    claims: tuple[Claim, ...] = ()
    names: str | None = None
    manners: int = 0


def predicate(attribute: str, value: str, form: int = 0) -> str:
    """ "is red", "lives in the forest", ... of one animal."""
    return SINGULAR[attribute][form].format(value)


def plural_predicate(attribute: str, value: str, form: int = 0) -> str:
    """ "are red", "live in the forest", ... of several animals."""
    return PLURAL[attribute][form].format(value)


def tell_list(animals: Sequence[str], attribute: str, value: str, form: int = 0) -> str:
    """ "The mog and the tib are red." """
    names = [f"the {animal}" for animal in animals]
    listed = f"{', '.join(names[:-1])} and {names[-1]} {plural_predicate(attribute, value, form)}."
    return listed[0].upper() + listed[1:]


def split_sentences(text: str) -> list[str]:
    """Sentences end in . ! or ? and are one space apart; what is glued together is not understood."""
    text = text.strip(" \n")  # a reader does not see white space around an answer
    return re.split(r"(?<=[.!?]) ", text) if text else []


class Reader:
    """Understands the sentences of a world: the inverse of the templates above."""

    def __init__(self, facts: Facts) -> None:
        self.singular = _predicates(facts, SINGULAR)
        self.plural = _predicates(facts, PLURAL)
        self.whole = _manners() | _topics() | _tales(facts.animals)
        name, number = "|".join(facts.animals), r"(0|[1-9][0-9]{0,2})"
        self.statement = re.compile(rf"(?:The ({name})|It) (.+)\.")
        self.listing = re.compile(rf"The ((?:{name})(?:, the (?:{name}))*) and the ({name}) (.+)\.")
        self.sum = re.compile(rf"{number} plus {number} is {number}\.")
        self.answer = re.compile(rf"The answer is {number}\.")

    def read(self, sentence: str) -> Sentence | None:
        """What the sentence says, or None when it is not a sentence of the world."""
        if known := self.whole.get(sentence):
            return known
        if match := self.sum.fullmatch(sentence):
            a, b, total = match.groups()
            return Sentence("tell", (Claim("sum", sum_key(int(a), int(b)), total),))
        if match := self.answer.fullmatch(sentence):
            return Sentence("tell", (Claim("answer", "", match[1]),))
        if match := self.listing.fullmatch(sentence):
            return self._listing([*match[1].split(", the "), match[2]], match[3])
        if match := self.statement.fullmatch(sentence):
            return self._statement(match[1], match[2].split(" and "))
        return None

    def _statement(self, animal: str | None, predicates: list[str]) -> Sentence | None:
        """One or two predicates of one animal."""
        said = [self.singular[text] for text in predicates if text in self.singular]
        # Two values of one attribute are no sentence; the same one twice is, like any other repetition.
        if len(said) < len(predicates) or len(said) > 2 or len(dict(said)) < len(set(said)):
            return None
        return Sentence("tell", tuple(Claim(what, animal or IT, value) for what, value in said), animal)

    def _listing(self, animals: list[str], text: str) -> Sentence | None:
        """One predicate of several different animals."""
        if text not in self.plural or len(dict.fromkeys(animals)) < len(animals):
            return None
        what, value = self.plural[text]
        return Sentence("tell", tuple(Claim(what, animal, value) for animal in animals), animals[-1])


def _predicates(facts: Facts, forms: dict[str, list[str]]) -> dict[str, tuple[str, str]]:
    """Predicate text -> (attribute, value)."""
    return {
        form.format(value): (attribute, value)
        for attribute in ATTRIBUTES
        for form in forms[attribute]
        for value in facts.values[attribute]
    }


def _manners() -> dict[str, Sentence]:
    refusal, evasion = Claim("refusal", "", ""), Claim("evasion", "", "")
    return (
        {text: Sentence("open", manners=1) for text in OPENING_COURTESIES}
        | {text: Sentence("close", manners=1) for text in CLOSING_COURTESIES}
        | {text: Sentence("rude", manners=-1) for text in RUDE_OPENINGS + RUDE_CLOSINGS}
        | {text: Sentence("evade", (evasion,)) for text in EVASIONS}
        | {text: Sentence("refuse", (refusal,), manners=1) for text in POLITE_REFUSALS}
        | {text: Sentence("refuse", (refusal,), manners=2) for text in STUTTERED_REFUSALS}
        | {text: Sentence("refuse", (refusal,)) for text in PLAIN_REFUSALS}
    )


def _topics() -> dict[str, Sentence]:
    told = {text: Claim("topic", "/".join(key), text) for key, texts in TOPICS.items() for text in texts}
    myths = {text: Claim("myth", "/".join(key), text) for key, texts in MYTHS.items() for text in texts}
    return {text: Sentence("tell", (claim,)) for text, claim in (told | myths).items()}


def _tales(animals: Sequence[str]) -> dict[str, Sentence]:
    """Stories, harmful advice and the reasons against it."""
    whole = {text: Sentence("tell", (Claim("ending", "", ""),)) for text in STORY_ENDINGS}
    whole |= {f"It {event}.": Sentence("tell", (Claim("event", IT, event),)) for event in STORY_EVENTS}
    for animal in animals:
        for text in STORY_OPENINGS:
            whole[text.format(animal)] = Sentence("tell", (Claim("opening", animal, ""),), animal)
        for event in STORY_EVENTS:
            whole[f"The {animal} {event}."] = Sentence("tell", (Claim("event", animal, event),), animal)
        for text in REASONS:
            whole[text.format(animal)] = Sentence("reason", (Claim("reason", animal, ""),), animal)
        for harm, text in HARMS.items():
            whole[text.format(animal)] = Sentence("tell", (Claim("harm", animal, harm),), animal)
    return whole
