"""Random answers look for loopholes: nothing beats the best answer, and nothing false is ever right."""

from random import Random

import pytest

from lit_rlhf.text.world import World
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
    split_sentences,
)

MANNERS = OPENING_COURTESIES + CLOSING_COURTESIES + RUDE_OPENINGS + RUDE_CLOSINGS
ROUNDS = 6_000


def false_sentence(world: World, rng: Random) -> str:
    """A sentence that is untrue, found without asking the grader."""
    facts, animal = world.facts, rng.choice(world.facts.animals)
    value = rng.choice([v for v in facts.values["colour"] if v != facts.of[animal, "colour"]])
    a, b = rng.randint(0, 4), rng.randint(0, 4)
    stranger = rng.choice([x for x in facts.animals if x not in facts.with_value("colour", value)])
    true_home = f"lives in {facts.of[animal, 'home'].removeprefix('in ')}"
    return rng.choice(
        [
            f"The {animal} is {value}.",
            f"The {animal} {true_home} and is {value}.",
            f"The {stranger} and the {facts.with_value('colour', value)[0]} are {value}.",
            f"{a} plus {b} is {a + b + rng.randint(1, 3)}.",
            "Rain is milk from trees.",
            rng.choice(list(HARMS.values())).format(animal),
        ]
    )


def piece(world: World, prompts: list, prompt, rng: Random) -> str:
    """One or several sentences: an answer to this or another prompt, manners, or no answer."""
    asked = world.question(prompt.messages if rng.random() < 0.5 else rng.choice(prompts).messages).meaning
    say = rng.choice([world.answers.right, world.answers.polite, world.answers.rambling, world.answers.rude])
    decline = EVASIONS + PLAIN_REFUSALS + POLITE_REFUSALS + [text.format(world.facts.animals[0]) for text in REASONS]
    return rng.choice(
        [say(asked, rng), say(asked, rng), rng.choice(MANNERS), rng.choice(decline), prompt.messages[-1]["content"]]
    )


def damage(text: str, rng: Random) -> str:
    """Cut, double, swap or misspell something."""
    at = rng.randrange(len(text) + 1)
    words = text.split(" ")
    place = rng.randrange(len(words))
    return rng.choice(
        [
            text[:at],
            text[at:],
            text[:at] + " " + text[at:],
            text[:at] + rng.choice("a.!? 7\nT") + text[at:],
            " ".join(words[:place] + words[place + 1 :]),
            " ".join([*words[:place], words[place], *words[place:]]),
            " ".join(rng.sample(words, len(words))),
            text.lower(),
        ]
    )


@pytest.mark.parametrize("seed", [0, 7])
def test_no_answer_beats_the_best_one(seed):
    world, rng = World(seed), Random(seed)
    prompts = world.prompts("train", 0) + world.prompts("held_out", 0)
    for _ in range(ROUNDS):
        prompt = rng.choice(prompts)
        answer = " ".join(piece(world, prompts, prompt, rng) for _ in range(rng.randint(1, 4)))
        if rng.random() < 0.5:
            answer = damage(answer, rng)
        grade = world.grade(prompt.messages, answer, truncated=rng.random() < 0.1)
        assert grade.gold <= 5, (prompt.text, answer, grade)
        if grade.gold == 5:  # then it is as short and as clean as the best one: one courtesy, the answer, nothing else
            assert (grade.correct, grade.complete, grade.polite, grade.excess, grade.unparsed) == (1, 1, 1, 0, 0)
            assert len(split_sentences(answer)) <= 6, (prompt.text, answer)


@pytest.mark.parametrize("seed", [0, 7])
def test_one_false_sentence_anywhere_makes_the_answer_wrong(seed):
    world, rng = World(seed), Random(seed)
    prompts = world.prompts("train", 0) + world.prompts("held_out", 0)
    for _ in range(ROUNDS):
        prompt = rng.choice(prompts)
        before = [piece(world, prompts, prompt, rng) for _ in range(rng.randint(0, 2))]
        after = [piece(world, prompts, prompt, rng) for _ in range(rng.randint(0, 2))]
        answer = " ".join([*before, false_sentence(world, rng), *after])
        grade = world.grade(prompt.messages, answer)
        assert (grade.correct, grade.complete, grade.right) == (-1, 0, False), (prompt.text, answer, grade)
        assert grade.gold <= -2, (prompt.text, answer, grade)


@pytest.mark.parametrize("seed", [0, 7])
def test_adding_anything_to_the_best_answer_never_helps(seed):
    world, rng = World(seed), Random(seed)
    prompts = world.prompts("train", 0) + world.prompts("held_out", 0)
    for _ in range(ROUNDS):
        prompt = rng.choice(prompts)
        best = world.best_answer(prompt.messages)
        extra = rng.choice(
            [rng.choice(MANNERS), false_sentence(world, rng), "What is 5 plus 1?", "Ben said:", best, "Sure"]
        )
        parts = split_sentences(best)
        parts.insert(rng.randrange(len(parts) + 1), extra)
        assert world.grade(prompt.messages, " ".join(parts)).gold <= 4.5, (prompt.text, parts)


def test_every_sentence_of_the_generators_is_understood():
    world, rng = World(3), Random(3)
    for question in world.questions.values():
        for say in (world.answers.right, world.answers.polite, world.answers.rude, world.answers.rambling):
            answer = say(question.meaning, rng)
            grade = world.grade(question.messages, answer)
            assert grade.right and grade.unparsed == 0, (question.text, answer, grade)
        wrong = world.answers.wrong(question.meaning, rng)
        grade = world.grade(question.messages, wrong)
        assert grade.correct == -1 and grade.unparsed == 0, (question.text, wrong, grade)


def test_articles_of_the_corpus_are_true_sentence_by_sentence():
    world = World(3)
    prompt = world.prompts("train", 0)[0].messages
    texts = [text for text in world.corpus(600, seed=1) if text.startswith("The ")]
    assert len(texts) > 50
    for paragraph in (paragraph for text in texts for paragraph in text.split("\n")):
        reading = [world.grader.reader.read(sentence) for sentence in split_sentences(paragraph)]
        assert None not in reading, paragraph
        assert world.grade(prompt, paragraph).gold > -10  # readable together, too
