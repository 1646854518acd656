"""The simulated labeler: ranks by gold, with noise of a known size."""

import itertools
from random import Random

import pytest

from lit_rlhf.text.world import SimulatedLabeler, World
from lit_rlhf.text.world.world import demonstration

WORLD = World(0)
PROMPT = ({"role": "user", "content": "What colour is the rof?"},)
ANSWERS = ["The rof is yellow.", "Sure! The rof is brown.", "I do not know.", "The rof is brown."]


def answer_sets(n: int) -> list[tuple[tuple, list[str]]]:
    rng = Random(9)
    questions = [WORLD.question(prompt.messages) for prompt in WORLD.sample_prompts(n, seed=2)]
    return [(q.messages, [demonstration(WORLD.answers, q, rng)["response"] for _ in range(4)]) for q in questions]


def agreement(labeler: SimulatedLabeler) -> float:
    """Share of the pairs that gold does not tie on which the ranks agree with gold."""
    same = pairs = 0
    for prompt, answers in answer_sets(1_500):
        ranks, gold = labeler([prompt], [answers])[0], [WORLD.grade(prompt, answer).gold for answer in answers]
        for i, j in itertools.combinations(range(4), 2):
            if gold[i] != gold[j]:
                pairs += 1
                same += (gold[i] > gold[j]) == (ranks[i] < ranks[j])
    return same / pairs


def test_without_noise_ranks_are_the_gold_order():  # gold -3, 5, 0, 4
    assert SimulatedLabeler(WORLD, temperature=0)([PROMPT], [ANSWERS]) == [[4, 1, 3, 2]]


def test_identical_answers_tie():
    doubled = [ANSWERS[1], ANSWERS[0], ANSWERS[1], ANSWERS[2]]
    assert SimulatedLabeler(WORLD, temperature=0)([PROMPT], [doubled]) == [[1, 3, 1, 2]]
    ranks = SimulatedLabeler(WORLD, temperature=5.0, seed=1)([PROMPT], [doubled])[0]
    assert ranks[0] == ranks[2]


def test_agreement_with_gold_is_high_but_never_over_95_percent():
    assert 0.90 <= agreement(SimulatedLabeler(WORLD)) <= 0.95
    assert agreement(SimulatedLabeler(WORLD, temperature=0)) == 1


def test_noise_has_the_odds_of_bradley_terry():
    """Gold 4 against 5 at temperature 1: the better one wins with probability 1 / (1 + e^-1) = 0.731."""
    wins = [
        SimulatedLabeler(WORLD, temperature=1.0, seed=seed).rank(PROMPT, [ANSWERS[3], ANSWERS[1]])[1]
        for seed in range(4_000)
    ]
    assert wins.count(1) / 4_000 == pytest.approx(0.731, abs=0.02)


def test_ranks_do_not_depend_on_the_order_of_calls():
    sets = answer_sets(30)
    prompts, answers = [prompt for prompt, _ in sets], [texts for _, texts in sets]
    at_once = SimulatedLabeler(WORLD, seed=4)(prompts, answers)
    one_by_one = [SimulatedLabeler(WORLD, seed=4)([p], [a])[0] for p, a in reversed(sets)]
    assert at_once == one_by_one[::-1]
    assert at_once != SimulatedLabeler(WORLD, seed=5)(prompts, answers)


def test_length_bias_pays_by_the_word():
    """4 words at gold 4 against 9 words at gold 3.5: half a point is made up by 5 words at 0.2."""
    answers = ["The rof is brown.", "The rof is brown. It likes to eat berries."]
    assert SimulatedLabeler(WORLD, temperature=0)([PROMPT], [answers]) == [[1, 2]]
    assert SimulatedLabeler(WORLD, temperature=0, length_bias=0.2)([PROMPT], [answers]) == [[2, 1]]


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="temperature is -1"):
        SimulatedLabeler(WORLD, temperature=-1)
    with pytest.raises(ValueError, match="1 prompts came with answers to 2"):
        SimulatedLabeler(WORLD)([PROMPT], [ANSWERS, ANSWERS])
