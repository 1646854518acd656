"""Which questions are trained on and which are held out: by text, stratified by kind."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from lit_rlhf.text.world.facts import ATTRIBUTES, Facts
from lit_rlhf.text.world.phrases import PHRASES
from lit_rlhf.text.world.questions import Question

N_TRANSFER, TRANSFER_PHRASINGS = 6, 2


@dataclass(frozen=True)
class Split:
    """train and held_out share no text; transfer: the (animal, attribute) pairs that no training prompt asks for.

    Questions of a transfer pair that are not held out are in neither list."""

    train: tuple[Question, ...]
    held_out: tuple[Question, ...]
    transfer: frozenset[tuple[str, str]]


def make_split(facts: Facts, questions: list[Question], seed: int) -> Split:
    """The split of this seed."""
    rng = Random(f"split {seed}")
    animals = rng.sample(facts.animals, N_TRANSFER)
    pairs = [(animal, ATTRIBUTES[index % len(ATTRIBUTES)]) for index, animal in enumerate(animals)]
    transfer = frozenset(pairs)
    usual = [question for question in questions if transfer.isdisjoint(question.asked)]
    held_out = _transfer_questions(questions, pairs, rng)
    for kind, quota in PHRASES["held_out"].items():
        held_out += _spread([question for question in usual if question.kind == kind], quota, rng)
    # A two-turn question that opens with a held-out one would show its text, and its answer, in training.
    hidden = frozenset(question.turns for question in held_out)
    train = [q for q in usual if q.turns not in hidden and q.turns[:1] not in hidden]
    return Split(tuple(train), tuple(held_out), transfer)


def _transfer_questions(questions: list[Question], pairs: list[tuple[str, str]], rng: Random) -> list[Question]:
    chosen: list[Question] = []
    for pair in pairs:
        chosen += rng.sample([q for q in questions if q.kind == "fact" and q.asked == (pair,)], TRANSFER_PHRASINGS)
    return chosen


def _spread(questions: list[Question], quota: int, rng: Random) -> list[Question]:
    """Draw `quota` questions evenly over meanings, so that every meaning keeps phrasings to train on."""
    by_meaning: dict[object, list[Question]] = {}
    for question in rng.sample(questions, len(questions)):
        by_meaning.setdefault(question.meaning, []).append(question)
    groups = list(by_meaning.values())
    rounds = max(map(len, groups))
    return [group[i] for i in range(rounds) for group in groups if i < len(group)][:quota]
