from collections import Counter

import pytest
from hypothesis import given, strategies as st

from lit_rlhf.functional.diversity import distinct_ngrams, ngrams, self_similarity, similarity

WORDS = st.lists(st.sampled_from("abc"), max_size=6)


def test_ngrams_by_hand():
    assert ngrams("abab", 2) == Counter({("a", "b"): 2, ("b", "a"): 1})
    assert ngrams(["a"], 2) == Counter()


def test_distinct_ngrams_by_hand():  # the rof is brown / the rof is red: 5 of 8 words, 4 of 6 pairs of words
    answers = [text.split() for text in ("the rof is brown", "the rof is red")]
    assert distinct_ngrams(answers, 1) == (5, 8)
    assert distinct_ngrams(answers, 2) == (4, 6)
    assert distinct_ngrams([[], []], 1) == (0, 0)


def test_similarity_by_hand():  # ^a ab bc c$ and ^a ab bd d$: two of four in common
    assert similarity("abc", "abd") == 0.5
    assert similarity("a", "a") == 1.0 and similarity("a", "b") == 0.0
    assert similarity("", "") == 1.0 and similarity("", "a") == 0.0
    assert similarity("aab", "ab", n=1) == 2 * 4 / 9  # the two ends, one a, b of 5 and 4


def test_self_similarity_is_the_mean_over_pairs():
    assert self_similarity(["abc", "abd", "xyz"]) == pytest.approx(0.5 / 3)
    assert self_similarity(["abc"] * 4) == 1.0
    assert self_similarity(["ab", "cd", "ef"]) == 0.0


@given(WORDS, WORDS, st.integers(1, 3))
def test_similarity_is_symmetric_and_a_share(ours, theirs, n):
    assert similarity(ours, theirs, n) == similarity(theirs, ours, n)
    assert 0 <= similarity(ours, theirs, n) <= 1
    assert similarity(ours, ours, n) == 1.0


@given(st.lists(WORDS, min_size=1, max_size=4), st.integers(1, 3))
def test_saying_everything_twice_adds_nothing_distinct(answers, n):
    distinct, total = distinct_ngrams(answers, n)
    assert distinct_ngrams(answers + answers, n) == (distinct, 2 * total)
    assert distinct <= total
