import math

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from lit_rlhf.functional.interval import ratio, ratio_difference, resampled, wilson_interval, window_error


def test_wilson_interval_by_hand():  # Wilson 1927; 7 of 10 is the textbook's 39.7% to 89.2%
    assert wilson_interval(7, 10) == pytest.approx((0.3968, 0.8922), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 1.959964**2 / (10 + 1.959964**2)))


def test_wilson_interval_holds_the_shares_that_a_test_would_not_reject():
    low, high = wilson_interval(33, 120)
    for end in (low, high):  # the ends are 1.96 standard errors of theirs from what was seen
        assert abs(33 / 120 - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / 120))


def test_wilson_interval_covers_small_shares():
    generator = torch.Generator().manual_seed(0)
    wins = torch.binomial(torch.full((4000,), 30.0), torch.full((4000,), 0.06), generator=generator)
    covered = sum(low <= 0.06 <= high for low, high in (wilson_interval(w, 30) for w in wins.tolist()))
    assert 0.93 <= covered / 4000 <= 0.985


def test_each_resample_draws_as_many_prompts_as_there_are():
    counts = resampled(7, 500, seed=3)
    assert (counts.sum(1) == 7).all() and counts.mean().item() == 1.0
    assert torch.equal(counts, resampled(7, 500, seed=3)) and not torch.equal(counts, resampled(7, 500, seed=4))


def test_ratio_weighs_long_answers_more():
    estimate = ratio(tensor([1.0, 9.0]), tensor([1.0, 3.0]))  # 10 nats of 4 tokens; one prompt alone: 1 or 3
    assert (estimate.value, estimate.low, estimate.high, estimate.n) == (2.5, 1.0, 3.0, 2)


def test_ratio_of_ones_is_a_mean_with_its_standard_error():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    estimate, error = ratio(values, torch.ones(400)), values.std().item() / 20
    assert_close(estimate.value, values.mean().item())
    assert_close(estimate.high - estimate.low, 2 * 1.96 * error, rtol=0.08, atol=0)


def test_what_is_hard_for_both_drops_out_of_the_difference():
    hard = 10 * torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ones = torch.ones(200)
    estimate = ratio_difference((hard + 1, ones), (hard, ones))
    assert estimate[:3] == pytest.approx((1.0, 1.0, 1.0))
    assert ratio(hard, ones).high - ratio(hard, ones).low > 2


def test_the_error_of_a_drifting_series():
    """A trend of 1 per value adds 1 to each squared difference, and the noise of +-1 from value to value 4."""
    assert window_error([0.0, 1.0, 2.0, 3.0], window=4) == 0.5  # sqrt(1 / 4)
    assert window_error([1.0, -1.0, 1.0, -1.0, 1.0], window=1) == 2.0
    noise = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).tolist()
    assert window_error(noise, window=8) == pytest.approx((2 / 8) ** 0.5, rel=0.03)  # of two means over 8
