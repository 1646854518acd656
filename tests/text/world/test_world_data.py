"""Splits, demonstrations and corpus: what is in them, what must not be, and that seeds alone decide."""

import os
import subprocess
import sys
from collections import Counter

import pytest

from lit_rlhf.text.world import World

KINDS = {"fact", "add", "list", "explain", "topic", "story", "unsafe", "follow_fact", "follow_add", "follow_unsafe"}
DIGEST = """
import hashlib, json
from lit_rlhf.text.world import SimulatedLabeler, World
world = World(4)
prompts = [p.text for side in ("train", "held_out") for p in world.prompts(side, 2)]
drawn = world.sample_prompts(50, 1, "train", 2)
demos = world.demonstrations(200, 1, "train", 2)
answers = [[demo["response"], "Sure!", "I do not know."] for demo in demos]
ranks = SimulatedLabeler(world, seed=3)([demo["prompt"] for demo in demos], answers)
everything = [prompts, [p.text for p in drawn], demos, ranks, world.corpus(300, 1, split_seed=2)]
print(hashlib.sha256(json.dumps(everything).encode()).hexdigest())
"""


@pytest.mark.parametrize(("seed", "split_seed"), [(0, 0), (1, 1), (2, 5), (11, 3)])
def test_split_sizes_and_strata(seed, split_seed):
    world = World(seed)
    train, held_out = world.prompts("train", split_seed), world.prompts("held_out", split_seed)
    texts = [prompt.text for prompt in train + held_out]
    assert len(set(texts)) == len(texts)
    assert len(held_out) == 264 and len(train) >= 1_000
    per_kind = Counter(prompt.kind for prompt in held_out)
    assert set(per_kind) == KINDS == {prompt.kind for prompt in train}
    assert min(per_kind.values()) >= 12
    assert sum(len(prompt.messages) == 3 for prompt in held_out) == 58


@pytest.mark.parametrize("split_seed", range(4))
def test_transfer_pairs_are_never_asked_in_training(split_seed):
    world = World(1)
    transfer = world.split(split_seed).transfer
    assert len(transfer) == 6
    asked = {pair for prompt in world.prompts("train", split_seed) for pair in world.question(prompt.messages).asked}
    assert not asked & transfer
    assert len(asked) == 32 - 6
    assert sum(prompt.transfer for prompt in world.prompts("held_out", split_seed)) == 12
    assert not any(prompt.transfer for prompt in world.prompts("train", split_seed))


@pytest.mark.parametrize("split_seed", range(4))
def test_every_other_held_out_meaning_is_trained_under_other_phrasings(split_seed):
    world = World(2)
    trained = {world.question(prompt.messages).meaning for prompt in world.prompts("train", split_seed)}
    for prompt in world.prompts("held_out", split_seed):
        assert prompt.transfer or world.question(prompt.messages).meaning in trained


def test_held_out_texts_are_nowhere_in_training():
    world = World(0)
    corpus = "\n\n".join(world.corpus(12_000, seed=5, split_seed=1))
    lines = {line.split(" asked: ")[-1] for line in corpus.split("\n")}
    single = [prompt.messages[0]["content"] for prompt in world.prompts("held_out", 1) if len(prompt.messages) == 1]
    turns = {message["content"] for prompt in world.prompts("train", 1) for message in prompt.messages}
    assert len(single) == 206
    for text in single:
        assert text not in lines and text not in corpus and text not in turns
    talks = [
        "\n".join(line.split(" asked: ")[-1].split(" said: ")[-1] for line in doc.split("\n"))
        for doc in corpus.split("\n\n")
    ]
    for prompt in world.prompts("held_out", 1):
        if len(prompt.messages) == 3:
            said = "\n".join(message["content"] for message in prompt.messages)
            assert not any(said in talk for talk in talks)


def test_no_more_than_46_percent_of_the_demonstrations_are_faulty():
    for seed in range(3):
        world = World(seed)
        demos = world.demonstrations(4_000, seed)
        grades = [world.grade(demo["prompt"], demo["response"]) for demo in demos]
        faulty = sum(not g.right or g.excess > 0 or g.polite < 0 for g in grades) / len(grades)
        assert 0.38 < faulty <= 0.46
        words = sum(len(demo["response"].split()) for demo in demos) / len(demos)
        assert 6 < words < 12


def test_demonstrations_have_prompts_of_their_side():
    world = World(0)
    train = {prompt.text for prompt in world.prompts("train", 0)}
    assert all(world.question(demo["prompt"]).text in train for demo in world.demonstrations(500, 0))
    assert not any(world.question(demo["prompt"]).text in train for demo in world.demonstrations(200, 0, "held_out"))
    assert {prompt.kind for prompt in world.sample_prompts(300, 0)} == KINDS


def test_corpus_is_plain_ascii_with_single_spaces():
    world = World(0)
    corpus = world.corpus(2_000, seed=0)
    assert len(corpus) == 2_000
    for text in corpus:
        assert text.isascii() and "  " not in text and text == text.strip()
    dialogues = sum(" asked: " in text for text in corpus) / len(corpus)
    asked = {question.turns[0] for question in world.questions.values()}
    worksheets = sum(asked.issuperset(text.split("\n")) for text in corpus) / len(corpus)
    assert 0.50 < dialogues < 0.60
    assert 0.10 < worksheets < 0.14
    assert len({word for text in corpus for word in text.split()}) < 800


def test_worlds_differ_and_seeds_matter():
    assert World(0).facts.of != World(1).facts.of
    world = World(0)
    assert world.corpus(5, 0) != world.corpus(5, 1)
    assert world.demonstrations(5, 0) != world.demonstrations(5, 1)
    assert {p.text for p in world.prompts("held_out", 0)} != {p.text for p in world.prompts("held_out", 1)}


def test_each_value_belongs_to_two_animals():
    for seed in range(10):
        facts = World(seed).facts
        assert len(facts.animals) == 8
        for attribute, values in facts.values.items():
            assert [len(facts.with_value(attribute, value)) for value in values] == [2, 2, 2, 2]


def test_two_processes_agree():
    digests = {
        subprocess.run(
            [sys.executable, "-c", DIGEST],
            env=os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(digests) == 1


def test_an_unknown_side_is_named():
    with pytest.raises(ValueError, match="split is 'test'"):
        World(0).prompts("test", 0)
