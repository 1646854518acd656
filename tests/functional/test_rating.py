import math

import pytest
import torch
from hypothesis import given, strategies as st
from torch import tensor
from torch.testing import assert_close

from lit_rlhf.functional.rating import (
    best_of_n,
    best_of_n_kl,
    bradley_terry,
    elo,
    pairwise_wins,
    ratings,
    tournament,
    win_rate,
)


def test_pairwise_wins_by_hand():
    ours, theirs = tensor([[3.0, 1.0], [0.0, 0.0]]), tensor([[2.0, 1.0, 0.0], [0.0, 5.0, -1.0]])
    # 3 beats all three; 1 loses, ties, wins: 4.5 of 6. 0 ties, loses, wins, twice: 3 of 6.
    assert_close(pairwise_wins(ours, theirs), tensor([0.75, 0.5], dtype=torch.float64))


def test_equal_texts_tie_whatever_their_scores_last_bits():
    ours, theirs = tensor([[1.0, 0.0]]), tensor([[1.0 - 2**-24, 2.0]])
    texts = [["Yes.", "No."]], [["Yes.", "No!"]]
    assert_close(pairwise_wins(ours, theirs), tensor([0.25], dtype=torch.float64))
    assert_close(pairwise_wins(ours, theirs, texts), tensor([0.125], dtype=torch.float64))  # 1/2 + 0 + 0 + 0 of 4
    assert win_rate(ours, theirs, texts).mean == 0.125
    assert win_rate(ours[:, :1], theirs[:, :1], ([["Yes."]], [["Yes."]])).mean == 0.5
    wins = tournament([ours, theirs], texts)
    assert_close(wins, tensor([[[0.0, 0.125], [0.875, 0.0]]], dtype=torch.float64))


def test_texts_belong_to_the_grades():
    with pytest.raises((ValueError, RuntimeError)):
        pairwise_wins(torch.zeros(2, 2), torch.zeros(2, 2), ([["a", "b"]], [["a", "b"]]))


def test_comparisons_without_a_grade_do_not_count():
    nan = math.nan
    ours, theirs = tensor([[1.0, nan], [2.0, 0.0], [nan, nan]]), tensor([[0.0], [1.0], [1.0]])
    assert_close(pairwise_wins(ours, theirs), tensor([1.0, 0.5, nan], dtype=torch.float64), equal_nan=True)
    result = win_rate(ours, theirs)
    assert (result.mean, result.n, result.prompts) == (0.75, 3, 2)
    assert win_rate(ours[2:], theirs[2:])[3:] == (0, 0)
    same = ([["a", "b"]], [["b"]])
    assert pairwise_wins(ours[:1], theirs[:1], same).item() == 1.0  # nobody graded b


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
    result = win_rate(torch.zeros(10, 3), torch.zeros(10, 2))
    assert (result.n, result.prompts) == (30, 10)
    assert (result.mean, result.low, result.high) == (0.5, 0.5, 0.5)


def drawn_tournament(truth, prompts, generator):
    """Worth of one answer a model and prompt: strength plus Gumbel noise, so that i beats j with σ(s_i − s_j) exactly,
    though a good answer to a prompt wins against all others to it at once."""
    noise = -torch.log(-torch.log(torch.rand(prompts, len(truth), generator=generator, dtype=torch.float64)))
    return tournament([(truth + noise)[:, i, None] for i in range(len(truth))])


def test_tournament_by_hand():
    wins = tournament([tensor([[3.0, 1.0], [0.0, 0.0]]), tensor([[2.0], [0.0]])])  # 1 of 2; a tie
    assert_close(wins, tensor([[[0.0, 0.5], [0.5, 0.0]], [[0.0, 0.5], [0.5, 0.0]]], dtype=torch.float64))


def test_two_models_are_as_strong_as_the_odds():  # 30 : 10 without a prior is log 3
    wins = tensor([[0.0, 30.0], [10.0, 0.0]])
    strengths = bradley_terry(wins, prior=0.0)
    assert_close(strengths[0] - strengths[1], tensor(math.log(3), dtype=torch.float64))
    with_prior = bradley_terry(wins)
    assert_close((with_prior[0] - with_prior[1]).item(), math.log(30.5 / 10.5))


def test_strengths_are_those_of_zermelos_iteration():  # another method, one game at a time in loops
    generator = torch.Generator().manual_seed(0)
    wins = torch.randint(1, 30, (5, 5), generator=generator).double().fill_diagonal_(0).tolist()
    weights = [1.0] * 5
    for _ in range(150):
        weights = [
            sum(wins[i]) / sum((wins[i][j] + wins[j][i]) / (weights[i] + weights[j]) for j in range(5) if j != i)
            for i in range(5)
        ]
    expected = torch.tensor(weights, dtype=torch.float64).log()
    assert_close(bradley_terry(tensor(wins), prior=0.0), expected - expected.mean(), rtol=0, atol=1e-6)


def test_extreme_records_reach_the_maximum():  # the gradient is 0: each model wins as often as its strength says
    wins = tensor([[0.0, 1000.0, 1000.0], [0.0, 0.0, 999.0], [0.0, 1.0, 0.0]]).double()
    strengths = bradley_terry(wins)
    games, chance = wins + 0.5 * (1 - torch.eye(3)), torch.sigmoid(strengths[:, None] - strengths)
    assert_close(games.sum(1), ((games + games.T) * chance * (1 - torch.eye(3))).sum(1))


def test_a_perfect_record_is_finite_and_wide():
    wins = tensor([[0.0, 1.0], [0.0, 0.0]]).double().expand(50, 2, 2)
    result = ratings(wins, anchor=1)
    assert_close(result.strengths, tensor([math.log(50.5 / 0.5), 0.0], dtype=torch.float64))
    assert result.high[0] - result.low[0] > 4  # nats: who never lost may be anything from clearly better upwards
    assert 0 < result.low[0] < result.strengths[0] < result.high[0]
    assert (result.low[1], result.high[1]) == (0, 0)


def test_groups_that_never_met_have_no_common_scale():
    wins = torch.zeros(4, 4)
    wins[0, 1] = wins[1, 0] = wins[2, 3] = wins[3, 2] = 3.0
    with pytest.raises(ValueError, match="never met"):
        bradley_terry(wins)
    with pytest.raises(ValueError, match="never met"):
        ratings(wins.expand(9, 4, 4))
    wins[1, 2] = 1.0  # a bridge, though a game that only one side ever won
    assert bradley_terry(wins).isfinite().all()


def test_not_all_pairs_have_to_meet():  # a against b 3 : 1, b against c 1 : 1; a against c follows
    wins = tensor([[0.0, 3.0, 0.0], [1.0, 0.0, 2.0], [0.0, 2.0, 0.0]])
    strengths = bradley_terry(wins, prior=0.0)
    assert_close((strengths - strengths[1]).tolist(), [math.log(3), 0.0, 0.0])


def test_elo_is_400_points_for_odds_of_ten():
    assert_close(elo(tensor([0.0, math.log(10), -math.log(10)])), tensor([1000.0, 1400.0, 600.0]))
    assert_close(elo(tensor([math.log(100)]), 0.0), tensor([800.0]))


def test_a_simulated_tournament_gives_back_its_strengths():
    points = tensor([1000.0, 900.0, 1130.0, 1275.0, 1210.0, 640.0], dtype=torch.float64)
    truth = (points - 1000) * math.log(10) / 400
    result = ratings(drawn_tournament(truth, 4000, torch.Generator().manual_seed(1)))
    low, rating, high = elo(result.low), elo(result.strengths), elo(result.high)
    off = (rating - points).abs()[1:] / ((high - low)[1:] / 2)  # in half widths of the intervals, the anchor apart
    assert (off < 1).sum() >= 4 and off.max() < 1.5  # of five 95% intervals, one may miss
    assert (high - low)[1:].max() < 35
    assert torch.equal(rating.argsort(), points.argsort())


def covered(truth, wins):
    """Share (M - 1,) of the tournaments (S, P, M, M) in which each interval holds its true strength."""
    result = ratings(wins)
    return ((result.low <= truth) & (truth <= result.high))[:, 1:].double().mean(0)


@pytest.mark.parametrize("prompts", [60, 150])
def test_intervals_of_ratings_cover_the_truth_95_percent_of_the_time(prompts):
    truth, generator = tensor([0.0, -1.0, 0.5, 1.5], dtype=torch.float64), torch.Generator().manual_seed(1)
    worths = truth - torch.log(-torch.log(torch.rand(1000, prompts, 4, generator=generator, dtype=torch.float64)))
    share = covered(truth, (worths[..., :, None] > worths[..., None, :]).double())
    assert ((share >= 0.93) & (share <= 0.97)).all()


def test_intervals_of_ratings_cover_the_truth_where_all_games_are_independent():
    truth, generator = tensor([0.0, -1.0, 0.5, 1.5], dtype=torch.float64), torch.Generator().manual_seed(1)
    won = torch.rand(1000, 100, 4, 4, generator=generator) < torch.sigmoid(truth[:, None] - truth)
    share = covered(truth, won.double().triu(1) + (1 - won.double()).triu(1).mT)
    assert ((share >= 0.93) & (share <= 0.97)).all()


def test_errors_are_the_odds_ratios():  # of independent games between two: 1 / sqrt(n p (1 - p)) of the log-odds
    wins = torch.zeros(40, 2, 2)
    wins[:30, 0, 1] = wins[30:, 1, 0] = 1.0
    result = ratings(wins, anchor=1, prior=0.0)
    error = math.sqrt(40 / 39) / math.sqrt(40 * 3 / 16)
    assert_close(result.high[0] - result.strengths[0], tensor(1.959964 * error, dtype=torch.float64), rtol=0, atol=1e-5)


def test_asking_a_prompt_twice_teaches_nothing_about_others():
    once = drawn_tournament(tensor([0.0, 1.0, 2.0]), 50, torch.Generator().manual_seed(0))
    for one, both in zip(ratings(once, prior=0.0), ratings(2 * once, prior=0.0)):
        assert_close(one, both)


def test_always_winning_is_not_certain():  # nine of nine: Wilson's lower end is 9 / (9 + 1.96^2)
    assert win_rate(torch.ones(9, 2), torch.zeros(9, 2))[:3] == pytest.approx((1.0, 9 / (9 + 1.959964**2), 1.0))
    lost = (0.0, 0.0, 1.959964**2 / (9 + 1.959964**2))
    assert win_rate(torch.zeros(9, 2), torch.ones(9, 2))[:3] == pytest.approx(lost)


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


@pytest.mark.parametrize("prompts", [1, 2, 5, 9])
def test_a_few_prompts_decide_nothing(prompts):
    """Each prompt is won by 5 of 16: nothing differs between prompts, which says little of other prompts."""
    ours = torch.cat([torch.ones(prompts, 5), torch.zeros(prompts, 11)], 1)
    theirs = torch.full((prompts, 4), 0.5)
    mean, low, high, *_ = win_rate(ours, theirs)
    assert mean == 5 / 16 and low < mean - 0.2 and high > 0.5
    found = ratings(tournament([theirs, ours]))
    assert found.low[1] < -2 and found.high[1] > 0.3


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
