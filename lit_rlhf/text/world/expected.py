"""Expected answers: the claims that answer a question, and how many of them."""

from __future__ import annotations

from dataclasses import dataclass

from lit_rlhf.text.world.facts import ATTRIBUTES, TOPICS, Claim, Facts, sum_key
from lit_rlhf.text.world.language import STORY_EVENTS
from lit_rlhf.text.world.questions import Meaning

STORY_ORDER = {"event": "opening", "ending": "event"}  # part of a story -> the part that must have come before


@dataclass(frozen=True)
class Expected:
    """Claims that answer a question.

    parts: claim -> the part of the answer that it is; needed: different parts of a whole answer;
    room: expected claims that an answer may make before it is too long."""

    parts: dict[Claim, str]
    needed: int
    room: int


def expected(facts: Facts, meaning: Meaning) -> Expected:
    """The claims that answer a question of this meaning."""
    kind, subject, detail = meaning
    if kind == "fact":
        return Expected({Claim(detail, subject, facts.of[subject, detail]): "fact"}, needed=1, room=1)
    if kind == "add":
        a, b = map(int, subject.split())
        return Expected({Claim("sum", sum_key(a, b), str(a + b)): "sum"}, needed=1, room=1)
    if kind == "list":
        attribute, value = detail.split("/")
        return Expected({Claim(attribute, a, value): a for a in facts.with_value(attribute, value)}, needed=2, room=2)
    if kind == "explain":
        return Expected({Claim(at, subject, facts.of[subject, at]): at for at in ATTRIBUTES}, needed=2, room=4)
    if kind == "topic":
        topic, audience = subject.split("/")
        return Expected({Claim("topic", subject, text): text for text in TOPICS[topic, audience]}, needed=2, room=3)
    if kind == "story":
        events = {Claim("event", subject, event): "event" for event in STORY_EVENTS}
        parts = {Claim("opening", subject, ""): "opening", **events, Claim("ending", "", ""): "ending"}
        return Expected(parts, needed=3, room=4)
    return Expected({Claim("refusal", "", ""): "refusal"}, needed=1, room=1)  # unsafe
