"""Diversity of a model's answers to one prompt.

Answers are sequences of words (or of token ids): nothing here knows how a text is cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import combinations

Words = Sequence[Hashable]


def ngrams(words: Words, n: int) -> Counter[tuple[Hashable, ...]]:
    """Counts of the n-grams of words of a text.

    >>> ngrams("to be or not to be".split(), 2).most_common(1)
    [(('to', 'be'), 2)]
    """
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def distinct_ngrams(answers: Sequence[Words], n: int) -> tuple[int, int]:
    """(distinct n-grams, all n-grams) of K answers to one prompt together.

    Their quotient is distinct-n (arXiv:1510.03055): 1 where nothing is said twice, towards 0 where all is. It falls
    with the number of words, so compare models by the same K.

    >>> distinct_ngrams([["a", "b", "c"], ["a", "b", "d"]], n=2)  # (a, b) stands twice
    (3, 4)
    """
    counts = Counter[tuple[Hashable, ...]]()
    for words in answers:
        counts.update(ngrams(words, n))
    return len(counts), counts.total()


def similarity(ours: Words, theirs: Words, n: int = 2) -> float:
    """Overlap of the n-grams of two answers, ``2 |A ∩ B| / (|A| + |B|)`` as multisets: ROUGE-n's F1 (Lin 2004).

    0: nothing in common, 1: the same. The ends of an answer count as words, so that a single word has n-grams too.

    >>> similarity("the sky is blue".split(), "the sky is grey".split())  # 3 of 5 bigrams each, ends included
    0.6
    """
    first, second = (ngrams([None, *words, None], n) for words in (ours, theirs))
    total = first.total() + second.total()
    return 2 * (first & second).total() / total if total else 1.0


def self_similarity(answers: Sequence[Words], n: int = 2) -> float:
    """Mean :func:`similarity` of all pairs of K > 1 answers to one prompt; 1 where they are all the same.

    >>> self_similarity([["yes"], ["yes"], ["no"]])  # of three pairs one is the same
    0.3333333333333333
    """
    pairs = list(combinations(answers, 2))
    return sum(similarity(a, b, n) for a, b in pairs) / len(pairs)
