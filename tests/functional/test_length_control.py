import math

import numpy as np
import pytest
import torch
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from lit_rlhf.functional import length_controlled_win_rate, wilson_interval, win_rate


def answers(lengths):
    """Texts of these lengths, no two of them alike."""
    return [[f"{i},{j},".ljust(n, "x") for j, n in enumerate(row)] for i, row in enumerate(lengths)]


def drawn(theta, phi, prompts, seed):
    """Grades and texts of two models, one answer each: ours wins with probability σ(θ + φ · tanh(d / std(d)))."""
    rng = np.random.default_rng(seed)
    ours, theirs = rng.integers(20, 120, (prompts, 1)), rng.integers(20, 80, (prompts, 1))
    d = (ours - theirs).astype(np.float64)
    wins = rng.random((prompts, 1)) < expit(theta + phi * np.tanh(d / d.std(ddof=1)))
    texts = answers(ours.tolist()), [[t + "y" for t in row] for row in answers((theirs - 1).tolist())]
    return torch.tensor(wins, dtype=torch.float64), torch.full((prompts, 1), 0.5), texts, d


def test_the_same_as_scikit_learn_fits():
    """AlpacaEval's formula ``tanh(std_delta_len) + not_gamed_baseline - 1`` (length_controlled_minimal),
    by scikit-learn;
    ties given as half a win and half a loss, as it gives them."""
    ours, theirs, texts, d = drawn(0.4, 1.2, 60, seed=0)
    ours[:5] = 0.5  # ties
    x = np.concatenate([np.tanh(d / d.std(ddof=1)), np.ones_like(d)], 1)
    y = np.where(ours == 0.5, 0.5, ours)[:, 0]
    model = LogisticRegression(C=100, fit_intercept=False, solver="newton-cholesky", tol=1e-12, max_iter=1000)
    model.fit(np.concatenate([x, x]), np.repeat([1, 0], len(x)), sample_weight=np.concatenate([y, 1 - y]))
    expected = model.predict_proba([[0.0, 1.0]])[0, 1]
    found = length_controlled_win_rate(ours, theirs, texts)
    assert found.mean == pytest.approx(expected, abs=1e-9)
    assert found.low < found.mean < win_rate(ours, theirs, texts).mean  # ours are longer, and longer ones win


def test_longer_answers_of_an_equal_model_are_no_better():
    ours, theirs, texts, _ = drawn(0.0, 2.0, 4000, seed=1)
    raw, found = win_rate(ours, theirs, texts), length_controlled_win_rate(ours, theirs, texts)
    assert raw.low > 0.6 and found.low < 0.5 < found.high and found.high - found.low < 0.05


def test_the_interval_holds_the_truth():
    found = [length_controlled_win_rate(*drawn(0.5, 1.0, 200, seed)[:3]) for seed in range(200)]
    assert 0.92 <= np.mean([f.low <= expit(0.5) <= f.high for f in found]) <= 0.98


def test_one_length_leaves_the_win_rate_as_it_is():
    grades = torch.tensor([[1.0], [1.0], [0.0], [1.0]]), torch.tensor([[0.0], [0.0], [1.0], [0.0]])
    found = length_controlled_win_rate(*grades, (answers([[9]] * 4), answers([[9]] * 4)))
    assert found.mean == 0.5  # equal texts tie
    found = length_controlled_win_rate(
        *grades, (answers([[9]] * 4), [[t[:-1] + "y" for t in r] for r in answers([[9]] * 4)])
    )
    assert found.mean == pytest.approx(0.75, abs=5e-3)  # the ridge takes a little


def test_a_prompt_counts_once_whatever_it_has_of_answers():
    """Answers that nobody graded leave the rest as it is, and so does each answer given twice."""
    ours, theirs, texts, _ = drawn(0.3, 0.5, 30, seed=2)
    once = length_controlled_win_rate(ours, theirs, texts)
    ungraded = torch.cat([ours, torch.full_like(ours, math.nan)], 1)
    more = length_controlled_win_rate(ungraded, theirs, ([[*row, "no grade"] for row in texts[0]], texts[1]))
    assert more == pytest.approx(once, rel=1e-9)
    nobody = length_controlled_win_rate(ungraded[:, 1:], theirs, texts)
    assert nobody.n == nobody.prompts == 0 and math.isnan(nobody.mean)


def test_a_perfect_record_has_an_interval():
    ours, theirs, texts, _ = drawn(0.0, 0.0, 20, seed=3)
    found = length_controlled_win_rate(torch.ones_like(ours), theirs, texts)
    assert found[1:3] == wilson_interval(20, 20) and 0.99 < found.mean < 1
