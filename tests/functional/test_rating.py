import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import tensor
from torch.testing import assert_close

from lit_rlhf.functional.rating import best_of_n, best_of_n_kl, pairwise_wins, win_rate


def test_pairwise_wins_by_hand():
    ours, theirs = tensor([[3.0, 1.0], [0.0, 0.0]]), tensor([[2.0, 1.0, 0.0], [0.0, 5.0, -1.0]])
    # 3 beats all three; 1 loses, ties, wins: 4.5 of 6. 0 ties, loses, wins, twice: 3 of 6.
    assert_close(pairwise_wins(ours, theirs), tensor([0.75, 0.5], dtype=torch.float64))


def test_pairwise_wins_against_loops():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randint(5, (6, n), generator=generator) for n in (3, 4))
    expected = [
        sum((a > b) + (a == b) / 2 for a in ours[p].tolist() for b in theirs[p].tolist()) / 12 for p in range(6)
    ]
    assert_close(pairwise_wins(ours, theirs), tensor(expected, dtype=torch.float64))
    assert_close(pairwise_wins(theirs, ours), 1 - tensor(expected, dtype=torch.float64))


def test_win_rate_counts_a_tie_half_and_prompts_alike():
    result = win_rate(tensor([[2.0], [1.0], [0.0], [1.0]]), tensor([[1.0], [1.0], [1.0], [0.0]]))  # win, tie, loss, win
    assert result.mean == 0.625 and result.low <= 0.625 <= result.high
    assert result.prompts == 4


def test_win_rate_counts_our_answers_and_the_prompts():
    result = win_rate(torch.zeros(5, 3), torch.zeros(5, 2))
    assert (result.n, result.prompts) == (15, 5)
    assert (result.mean, result.low, result.high) == (0.5, 0.5, 0.5)


def test_always_winning_leaves_no_interval():
    assert win_rate(torch.ones(9, 2), torch.zeros(9, 2))[:3] == (1.0, 1.0, 1.0)
    assert win_rate(torch.zeros(9, 2), torch.ones(9, 2))[:3] == (0.0, 0.0, 0.0)


def test_interval_has_the_width_of_95_percent():
    # 200 prompts, 120 won: a standard error of sqrt(.6 * .4 / 200), 1.96 of them on either side.
    ours = (torch.arange(200) < 120).float()[:, None]
    result = win_rate(ours, torch.full((200, 1), 0.5), resamples=20_000)
    half = 1.96 * math.sqrt(0.6 * 0.4 / 200)
    assert abs(result.low - (0.6 - half)) < 0.006 and abs(result.high - (0.6 + half)) < 0.006


def test_duplicated_answers_do_not_narrow_the_interval():  # prompts are resampled, not answers
    ours, theirs = torch.randn(2, 40, 1, generator=torch.Generator().manual_seed(0))
    once, often = win_rate(ours, theirs), win_rate(ours.repeat(1, 25), theirs.repeat(1, 25))
    assert often[:3] == once[:3] and once.high - once.low > 0.2
    assert (often.n, often.prompts) == (1000, 40)


def test_interval_covers_the_truth_95_percent_of_the_time():
    # A prompt is won with probability 0.6, and then by all of its four answers. Resampling answers instead of
    # prompts would halve the width and cover the truth two times in three only.
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for seed in range(300):
        won = (torch.rand(60, 1, generator=generator) < 0.6).float().expand(60, 4)
        result = win_rate(won, torch.full((60, 1), 0.5), resamples=400, seed=seed)
        covered += result.low <= 0.6 <= result.high
    assert 0.90 <= covered / 300 <= 0.98


def test_win_rate_depends_on_its_seed_alone():
    ours, theirs = torch.randn(2, 30, 3, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    assert win_rate(ours, theirs, seed=1) == win_rate(ours, theirs, seed=1)
    assert win_rate(ours, theirs, resamples=50, seed=1) != win_rate(ours, theirs, resamples=50, seed=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_best_of_n_takes_the_grade_of_the_highest_score():
    grades, scores = tensor([[9.0, 1.0, 5.0], [2.0, 7.0, 3.0]]), tensor([[0.1, 0.2, 0.9], [-1.0, -3.0, -2.0]])
    assert_close(best_of_n(grades, scores), tensor([5.0, 2.0]))
    assert_close(best_of_n(grades[:, :1], scores[:, :1]), tensor([9.0, 2.0]))


@pytest.mark.parametrize(
    ("n", "expected"), [(1, 0.0), (2, math.log(2) - 0.5), (4, 2 * math.log(2) - 0.75), (16, 4 * math.log(2) - 15 / 16)]
)
def test_best_of_n_kl_by_hand(n, expected):
    assert_close(best_of_n_kl(n), expected)


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_best_of_n_kl_is_that_of_many_answers_and_a_bound_for_few(n):
    def exact(m):  # the best of n from m equally likely answers is among the first i with probability (i / m)^n
        best = [(i / m) ** n - ((i - 1) / m) ** n for i in range(1, m + 1)]
        return sum(p * math.log(p * m) for p in best)

    assert_close(exact(5000), best_of_n_kl(n), rtol=0, atol=2e-3)
    assert all(exact(m) <= best_of_n_kl(n) + 1e-12 for m in (1, 2, 5, 30))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(0, 999))
def test_only_the_order_of_grades_counts(prompts, a, b, seed):
    generator = torch.Generator().manual_seed(seed)
    ours, theirs = (torch.randint(-3, 4, (prompts, n), generator=generator) for n in (a, b))
    wins = pairwise_wins(ours, theirs)
    assert_close(pairwise_wins(ours**3 + 5, theirs**3 + 5), wins)
    assert_close(pairwise_wins(ours.flip(1), theirs.flip(1)), wins)
    assert_close(pairwise_wins(-theirs, -ours), wins)
    assert_close(pairwise_wins(ours.flip(0), theirs.flip(0)), wins.flip(0))


def test_interval_of_skewed_wins_is_skewed():
    # 2 of 20 prompts won: of the binomial, 12% lie at 0 wins; 95.7% lie below 5 and 98.9% below 6.
    result = win_rate((torch.arange(20) < 2).float()[:, None], torch.full((20, 1), 0.5), resamples=20_000)
    assert_close((result.low, result.high), (0.0, 5 / 20), rtol=0, atol=1e-6)


@given(st.integers(1, 3), st.integers(1, 4), st.randoms(use_true_random=False))
def test_best_of_n_knows_neither_the_order_of_answers_nor_the_scale_of_scores(prompts, n, random):
    scores = tensor([random.sample(range(20), n) for _ in range(prompts)]).float()  # no ties
    grades = tensor([[random.random() for _ in range(n)] for _ in range(prompts)])
    expected = tensor([max(zip(s, g))[1] for s, g in zip(scores.tolist(), grades.tolist())])
    order = random.sample(range(n), n)
    assert torch.equal(best_of_n(grades[:, order], scores[:, order] / 3 - 5), expected)
