"""A bag-of-words baseline for the reward model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_matrix, vstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from lit_rlhf.text.records import Ranking

MOST = 20_000  # rankings on each side: the words of more take GiB


def bag_of_words_accuracy(train: Sequence[Ranking], held_out: Sequence[Ranking]) -> float:
    """Held-out accuracy of a logistic regression on how two answers differ in words (tf-idf) and length, by the first
    ``MOST`` rankings of each side."""
    train, held_out = list(train[:MOST]), list(held_out[:MOST])
    words = TfidfVectorizer(min_df=2, sublinear_tf=True)
    words.fit([text for ranking in train for text in ranking.responses])
    features, length_scale = _features(words, train, None)
    model = LogisticRegression(C=0.2, fit_intercept=False, max_iter=1000)
    # Both directions of each pair: the model must not learn which one stands first.
    model.fit(vstack([features, -features]), np.repeat([1, 0], features.shape[0]))
    return float(model.predict(_features(words, held_out, length_scale)[0]).mean())


def _features(words: TfidfVectorizer, rankings: list[Ranking], length_scale: float | None) -> tuple[csr_matrix, float]:
    """(M, words + 1) differences better - worse over all untied pairs, and the scale of the length."""
    pairs = [
        (r.responses[i], r.responses[j])
        for r in rankings
        for i in range(len(r.ranks))
        for j in range(len(r.ranks))
        if r.ranks[i] < r.ranks[j]
    ]
    better, worse = zip(*pairs)
    lengths = np.array([len(b.split()) - len(w.split()) for b, w in pairs], dtype=float)
    scale = length_scale or float(lengths.std()) or 1.0
    counts = words.transform(better) - words.transform(worse)
    return csr_matrix(np.hstack([counts.toarray(), lengths[:, None] / scale])), scale
