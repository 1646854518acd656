"""Small data is always split, alike in all stages that share what changed sides."""

import random

import pytest

from lit_rlhf.errors import UserError
from lit_rlhf.text.records import Moved, prompt_fingerprint, split_by_prompt
from lit_rlhf.text.records.split import is_held_out


def asked(text):
    return [{"role": "user", "content": text}]


def prompts(count, start=0):
    return [asked(f"Suggest a name for shop number {i}.") for i in range(start, start + count)]


def prints(side):
    return {prompt_fingerprint(messages) for messages in side}


def split(records, fraction, seed, fold=0, moved=None):
    return split_by_prompt(records, lambda p: p, fraction, seed, fold, moved)


@pytest.mark.parametrize("fraction", [0.02, 0.1, 0.25, 0.5, 0.9])
def test_two_prompts_or_more_are_never_refused(fraction):
    for count in [*range(2, 31), 50, 100, 200]:
        for seed in range(40):
            train, held_out = split(prompts(count), fraction, seed)
            assert train and held_out and len(train) + len(held_out) == count


@pytest.mark.parametrize("count", [2, 3, 4, 5, 12, 20])
def test_every_fold_of_few_prompts_has_something_to_test_on(count):
    for seed in range(50):
        for fold in range(5):
            train, held_out = split(prompts(count), 0.2, seed, fold)
            assert train and held_out and not prints(train) & prints(held_out)


def test_where_neither_side_is_empty_the_hash_decides():
    for seed in range(100):
        everything = prompts(20)
        held = [is_held_out(p, 0.2, seed) for p in everything]
        _, held_out = split(everything, 0.2, seed, moved=Moved())
        if 0 < sum(held) < 20:
            assert held_out == [p for p, h in zip(everything, held) if h]
        else:
            assert len(held_out) == 4  # as many as the fraction asks for


def test_the_nearest_to_the_threshold_change_sides():
    def places(**values):
        return values

    moved = Moved()
    # Of five prompts at 10% none is below .1; the nearest is b. With 40%, two are held out.
    assert moved.change_sides(places(a=0.5, b=0.2, c=0.9, d=0.7, e=0.6), False, 0.1) == {"b"}
    assert moved.held_out == {"b"}
    assert Moved().change_sides(places(a=0.95, b=0.5, c=0.9, d=0.7, e=0.6), False, 0.4) == {"b", "e"}
    # All three are below .9: the nearest to it is trained on.
    moved = Moved()
    assert moved.change_sides(places(a=0.1, b=0.8, c=0.3), True, 0.9) == {"a", "c"} and moved.train == {"b"}
    # A fold is held out between two thresholds, 0.2 and 0.4: the nearest to either.
    assert Moved().change_sides(places(a=0.05, b=0.7, c=0.55, d=0.9, e=0.1), False, 0.2, 1) == {"e"}


def test_what_was_trained_on_is_never_held_out():
    for seed in range(60):
        few = prompts(5)
        trained = prints(few[:4])
        moved = Moved(trained=trained)
        hashed = {prompt_fingerprint(p) for p in few if is_held_out(p, 0.02, seed)}
        _, held_out = split(few, 0.02, seed, moved=moved)
        assert prints(held_out) == ((hashed - trained) or prints(few[4:]))
        trained = prints(split(prompts(40), 0.1, seed)[0])  # a stage that holds out more than the one before it
        moved = Moved(trained=trained)
        sides = split(prompts(40), 0.5, seed, moved=moved)
        assert not prints(sides[1]) & trained and prints(sides[1]) and moved.kept > 5
    with pytest.raises(
        UserError, match=r"all 4 prompts were trained on by earlier stages, so that none can be held out; add prompts"
    ):
        seed = next(s for s in range(99) if not any(is_held_out(p, 0.02, s) for p in prompts(4)))
        split(prompts(4), 0.02, seed, moved=Moved(trained=prints(prompts(4))))


def test_stages_that_share_what_moved_never_have_a_prompt_on_both_sides():
    for seed in range(120):
        generator, moved, train, held_out = random.Random(seed), Moved(), set(), set()
        for _ in range(6):  # stages, each with other prompts of a pool of 24, some of them twice
            chosen = generator.choices(prompts(24), k=generator.randint(4, 16))
            if len(prints(chosen)) < 4 or not prints(chosen) - train:
                continue
            sides = split(chosen, 0.1, seed, moved=moved)
            train, held_out = train | prints(sides[0]), held_out | prints(sides[1])
            moved.trained |= prints(sides[0])
            assert not train & held_out


def test_what_moved_is_found_again_whatever_the_order():
    seed = next(s for s in range(99) if not any(is_held_out(p, 0.1, s) for p in prompts(12)))
    moved = Moved()
    first = split(prompts(12), 0.1, seed, moved=moved)
    again = split(prompts(12)[::-1] * 2, 0.1, seed, moved=Moved(set(moved.held_out), set(moved.train)))
    assert prints(first[1]) == prints(again[1]) == moved.held_out
    assert prints(split(prompts(12), 0.1, seed)[1]) == moved.held_out  # from the data alone
    # In a later stage with more prompts it is held out beside those of the hash.
    later = split(prompts(40), 0.1, seed, moved=moved)
    hashed = {prompt_fingerprint(p) for p in prompts(40) if is_held_out(p, 0.1, seed)}
    assert prints(later[1]) == moved.held_out | hashed


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is it?", "what is  IT?\n"),
        ("\uff37hat is it?", "What is it?"),  # a full-width letter
        ("caf\u00e9", "cafe\u0301"),  # one code point, or a letter and an accent
        ("STRASSE", "stra\u00dfe"),
    ],
)
def test_spellings_of_one_prompt_are_on_one_side(one, other):
    assert prompt_fingerprint(asked(one)) == prompt_fingerprint(asked(other))
    for seed in range(200):
        assert is_held_out(asked(one), 0.5, seed) == is_held_out(asked(other), 0.5, seed)
    system = [{"role": "system", "content": "Be kind."}, *asked(one)]
    assert all(is_held_out(system, 0.5, seed) == is_held_out(asked(one), 0.5, seed) for seed in range(50))


def test_distinct_prompts_are_counted():
    with pytest.raises(UserError, match=r"there is one distinct prompt, and to hold one out takes two"):
        split([asked("Why?"), asked("why?"), asked(" WHY? ")], 0.5, 0)
    train, held_out = split([asked("Why?")] * 30 + [asked("How?")], 0.1, 0)
    assert sorted((len(train), len(held_out))) == [1, 30]
