import math
from itertools import combinations

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from lit_rlhf.functional import (
    GainFit,
    best_of_n,
    best_of_n_gain,
    best_of_n_kl,
    expected_best_of_n,
    fit_best_of_n_gain,
    fit_rl_gain,
    peak_kl,
    rl_gain,
)


def test_gains_by_hand():
    """At d = e: e (3 - 2 log e) = e; at d = 2: 2 (3 - 2 * 2) = -2."""
    fit = GainFit(3.0, 2.0, 1.0)
    assert_close(rl_gain(tensor([0.0, 1.0, math.e]), fit), tensor([0.0, 3.0, math.e]).double())
    assert_close(best_of_n_gain(tensor([0.0, 1.0, 2.0]), fit), tensor([0.0, 1.0, -2.0]).double())


def test_rl_gain_peaks_where_its_slope_is_nothing():
    """d/dd d (a - b log d) = a - b log d - b, so at exp(a / b - 1): here at e."""
    around = rl_gain(tensor([math.e - 0.1, math.e, math.e + 0.1]), GainFit(2.0, 1.0, 1.0))
    assert around[1] > around[0] and around[1] > around[2]


def test_fits_find_the_curve_that_points_lie_on():
    distance = tensor([0.5, 1.0, 2.0, 4.0])
    for gain, fit in (
        ([0.5 * (3 + 2 * math.log(2)), 3.0, 2 * (3 - 2 * math.log(2)), 4 * (3 - 4 * math.log(2))], fit_rl_gain),
        ([0.5 * (3 - 1), 3 - 2.0, 2 * (3 - 4.0), 4 * (3 - 8.0)], fit_best_of_n_gain),
    ):
        assert_close(tensor(fit(distance, tensor(gain))), tensor([3.0, 2.0, 1.0]), atol=1e-5, rtol=1e-5)


def test_fit_by_hand_where_points_lie_beside_the_curve():
    """At d = 1, log d is 0: alpha is the mean gain there, 2, and the squares left over are 1 + 1.

    The point at 0 lies on any curve. Around their mean, 4/3, the gains 1, 3 and 0 have 42/9 squares."""
    alpha, _, r2 = fit_rl_gain(tensor([1.0, 1.0, 0.0]), tensor([1.0, 3.0, 0.0]))
    assert alpha == pytest.approx(2.0) and r2 == pytest.approx(1 - 2 / (42 / 9))


def test_two_points_say_nothing():
    assert math.isnan(fit_rl_gain(tensor([0.0, 1.0]), tensor([0.0, 1.0])).r2)


def test_expected_best_of_n_by_hand():
    """Scores order the worths 5, 1, 9 as 1 < 9 < 5 are chosen: of the three pairs, (1, 9) gives 9, the others 5."""
    worth, scores = tensor([[5.0, 1.0, 9.0]]), tensor([[0.3, 0.1, 0.2]])
    expected = {1: 5.0, 2: 19 / 3, 3: 5.0}
    for n, mean in expected.items():
        assert expected_best_of_n(worth, scores, n).item() == pytest.approx(mean)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_expected_best_of_n_against_all_subsets(n):
    generator = torch.Generator().manual_seed(0)
    worth, scores = torch.randn(2, 4, 6, generator=generator)
    subsets = [list(chosen) for chosen in combinations(range(6), n)]
    mean = torch.stack([best_of_n(worth[:, s], scores[:, s]) for s in subsets]).double().mean(0)
    assert_close(expected_best_of_n(worth, scores, n), mean)


def test_best_of_all_is_the_best():
    worth, scores = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    assert_close(expected_best_of_n(worth, scores, 8), best_of_n(worth, scores).double())
    assert_close(expected_best_of_n(worth, scores, 1), worth.double().mean(1))


def test_best_of_n_kl_by_hand():
    assert best_of_n_kl(1) == 0 and best_of_n_kl(2) == pytest.approx(0.6931 - 0.5, abs=1e-4)


def test_peaks_by_hand():
    assert peak_kl(GainFit(1.0, 0.5, 1.0), "RL", reach=3.0) == pytest.approx(math.e**2)  # at d = e
    assert peak_kl(GainFit(2.0, 0.5, 1.0), "best of n", reach=2.1) == pytest.approx(4.0)  # at d = 2
    assert peak_kl(GainFit(1.0, 0.5, 1.0), "RL", reach=2.0) is None  # further than was measured
    assert peak_kl(GainFit(1.0, 1e-9, 1.0), "RL", reach=9.0) is None
    assert peak_kl(GainFit(1.0, -0.1, 1.0), "RL", reach=9.0) is None  # rises for ever
