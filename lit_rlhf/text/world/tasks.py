"""Labelled tasks in the world: what kind of question, is it true, which answer, the same question, and the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import permutations
from random import Random
from typing import Any, Literal

from lit_rlhf.text.world.answers import Answers
from lit_rlhf.text.world.facts import ATTRIBUTES, Facts
from lit_rlhf.text.world.language import SINGULAR, predicate, tell_list
from lit_rlhf.text.world.questions import Question

TaskName = Literal["kind", "truth", "choice", "same", "answer"]
N_CHOICES = 4
HIDDEN_PAIRS = 2  # held-out animals of each attribute in "truth"
Row = dict[str, Any]


def task_rows(
    task: TaskName,
    facts: Facts,
    questions: Sequence[Question],
    known: Sequence[Question],
    n: int,
    rng: Random,
    held_out: bool,
    split_seed: int,
) -> list[Row]:
    """Up to n different records of a task, fewer where the world has no more.

    ``questions`` are those of one side of the split, ``known`` those to train on. "truth" asks no question: it is split
    by what it is about."""
    single, known = ([q for q in side if len(q.turns) == 1] for side in (questions, known))
    if task == "truth":
        return _claims(facts, n, rng, held_out, split_seed)
    draw: dict[str, Callable[[], Row]] = {
        "kind": lambda: _kind(single, rng),
        "choice": lambda: _choice(Answers(facts), single, rng),
        "same": lambda: _same(single, known, rng),
        "answer": lambda: _answer(facts, [q for q in single if q.kind in ("fact", "add", "list")], rng),
    }
    rows: dict[str, Row] = {}
    for _ in range(20 * n):
        if len(rows) == n:
            break
        row = draw[task]()
        rows.setdefault(str(sorted(map(str, row.values()))), row)
    return list(rows.values())


def _kind(questions: Sequence[Question], rng: Random) -> Row:
    """Text classification: what kind of question it is."""
    question = _any(questions, rng)
    return {"text": question.turns[0], "label": question.kind}


def _choice(answers: Answers, questions: Sequence[Question], rng: Random) -> Row:
    """Multiple choice: one answer is right, the others are false or about something else."""
    question = _any(questions, rng)
    right = answers.right(question.meaning, rng)
    choices = {right}
    for _ in range(40):
        if len(choices) < N_CHOICES:
            # An opening courtesy would tell apart who is right: right answers have none here.
            choices.add(_plain(answers, question, rng))
    shuffled = rng.sample(sorted(choices), len(choices))
    return {"context": question.turns[0], "choices": shuffled, "label": shuffled.index(right), "kind": question.kind}


def _plain(answers: Answers, question: Question, rng: Random) -> str:
    """A wrong answer without a courtesy before it."""
    text = answers.wrong(question.meaning, rng)
    return text.partition("! ")[2] or text


def _same(questions: Sequence[Question], known: Sequence[Question], rng: Random) -> Row:
    """Similarity: whether two questions ask the same; those that do not are mostly of one kind.

    The first one is of this side of the split, the second one to train on: held-out questions have few phrasings."""
    first, same = _any(questions, rng), rng.random() < 0.5
    kind = first.kind if same or rng.random() < 0.7 else rng.choice(sorted({q.kind for q in known}))
    others = [q for q in known if q.kind == kind and (q.meaning == first.meaning) == same and q.turns != first.turns]
    if not others:  # a question that is asked in one way only
        return _same(questions, known, rng)
    second = rng.choice(others)
    return {"text_a": first.turns[0], "text_b": second.turns[0], "label": "same" if same else "different"}


def _answer(facts: Facts, questions: Sequence[Question], rng: Random) -> Row:
    """An open question with all its right answers."""
    question = _any(questions, rng)
    kind, subject, detail = question.meaning
    if kind == "fact":
        value = facts.of[subject, detail]
        right = [f"The {subject} {predicate(detail, value, form)}." for form in range(len(SINGULAR[detail]))]
    elif kind == "add":
        a, b = map(int, subject.split())
        right = [f"{a} plus {b} is {a + b}.", f"{b} plus {a} is {a + b}.", f"The answer is {a + b}."]
    else:
        attribute, value = detail.split("/")
        animals = facts.with_value(attribute, value)
        forms = range(len(SINGULAR[attribute]))
        right = [tell_list(order, attribute, value, form) for order in (animals, animals[::-1]) for form in forms]
    return {"prompt": question.turns[0], "answers": list(dict.fromkeys(right)), "kind": kind}


def _claims(facts: Facts, n: int, rng: Random, held_out: bool, split_seed: int) -> list[Row]:
    """Claims about one animal, half of them with one false value.

    All that say anything about a hidden (animal, attribute) pair are held out: what is true of it can only be known
    from the text of pretraining."""
    hidden_rng = Random(f"claims {split_seed}")
    hidden = {(animal, at) for at in ATTRIBUTES for animal in hidden_rng.sample(facts.animals, HIDDEN_PAIRS)}
    pools: dict[bool, list[str]] = {True: [], False: []}
    for text, wrong, pairs in _all_claims(facts):
        if wrong <= 1 and bool(pairs & hidden) == held_out:
            pools[wrong == 0].append(text)
    size = min(n // 2, *map(len, pools.values()))
    rows = [
        {"text": text, "label": "true" if true else "false"}
        for true, pool in pools.items()
        for text in rng.sample(pool, size)
    ]
    rng.shuffle(rows)
    return rows


def _all_claims(facts: Facts) -> Iterator[tuple[str, int, set[tuple[str, str]]]]:
    """(text, false values in it, what it is about) of every claim of one or two values."""
    for animal in facts.animals:
        for attributes in (*permutations(ATTRIBUTES, 1), *permutations(ATTRIBUTES, 2)):
            pairs = {(animal, attribute) for attribute in attributes}
            told: list[tuple[list[str], int]] = [([], 0)]
            for attribute in attributes:
                told = [
                    ([*said, predicate(attribute, value, form)], wrong + (facts.of[animal, attribute] != value))
                    for said, wrong in told
                    for value in facts.values[attribute]
                    for form in range(len(SINGULAR[attribute]))
                ]
            for said, wrong in told:
                yield f"The {animal} {' and '.join(said)}.", wrong, pairs
                if len(said) == 2:
                    yield f"The {animal} {said[0]}. It {said[1]}.", wrong, pairs


def _any(questions: Sequence[Question], rng: Random) -> Question:
    """A question, its kind first: kinds have very different numbers of phrasings."""
    kind = rng.choice(sorted({question.kind for question in questions}))
    return rng.choice([question for question in questions if question.kind == kind])
