"""Labelled tasks of the built-in world: true to its facts, and nothing held out is seen in training."""

import pytest

from lit_rlhf.text.records import parse_task, task_prompt
from lit_rlhf.text.world import World

WORLD = World(3)
TASKS = ("kind", "truth", "choice", "same", "answer")


def rows(task, split="train", n=300, seed=0, split_seed=0):
    return WORLD.tasks(task, n, seed, split, split_seed)


@pytest.mark.parametrize("task", TASKS)
def test_records_are_valid_different_and_split_by_their_question(task):
    train, held_out = (rows(task, split) for split in ("train", "held_out"))
    assert len({str(r) for r in train}) == len(train) >= 280
    assert len({str(r) for r in held_out}) == len(held_out) >= 80
    asked = [{task_prompt(parse_task(r))[0]["content"] for r in side} for side in (train, held_out)]
    assert not asked[0] & asked[1]
    assert rows(task) == train != rows(task, seed=1)


def test_kinds_are_those_of_the_questions():
    assert all(WORLD.question(r["text"]).kind == r["label"] for r in rows("kind"))


def test_one_choice_is_right():
    for row in rows("choice"):
        right = [WORLD.grade(row["context"], text).right for text in row["choices"]]
        assert [i for i, good in enumerate(right) if good] == [row["label"]], row


def test_similar_questions_mean_the_same_in_half_of_the_cases():
    same = [(WORLD.question(r["text_a"]).meaning == WORLD.question(r["text_b"]).meaning, r) for r in rows("same")]
    assert all(equal == (r["label"] == "same") for equal, r in same)
    assert 0.35 < sum(equal for equal, _ in same) / len(same) < 0.6


def test_every_answer_is_graded_right():
    for row in rows("answer"):
        assert all(WORLD.grade(row["prompt"], text).right for text in row["answers"]), row


def test_claims_are_true_or_have_one_false_value_and_held_out_facts_are_not_talked_about():
    facts, reader = WORLD.facts, WORLD.grader.reader

    def said(text):
        """(what is said of the animal, how much of it is false)."""
        animal = text.split()[1]
        sentences = [reader.read(s + ".") for s in text.rstrip(".").split(". ")]
        claims = {(animal, claim.what, claim.value) for s in sentences for claim in s.claims}
        return {c[:2] for c in claims}, sum(facts.of[a, what] != value for a, what, value in claims)

    train, held_out = rows("truth", n=1000), rows("truth", "held_out", n=1000)
    for row in (*train, *held_out):
        assert (said(row["text"])[1] == 0) == (row["label"] == "true")
        assert said(row["text"])[1] <= 1
    for side in (train, held_out):
        assert 2 * sum(r["label"] == "true" for r in side) == len(side)
    known = set().union(*(said(r["text"])[0] for r in train))
    assert len(known) == 24 and all(said(r["text"])[0] - known for r in held_out)
