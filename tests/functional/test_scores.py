"""Scores by hand: their scale, and what is taken off them."""

import math

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from lit_rlhf.functional import ScoreScale, shaped_scores

SCALE = ScoreScale(shift=-2.0, mean=0.5, std=4.0)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, 8.5), ({"center": True}, 8.0), ({"divide": True}, 2.125), ({"divide": True, "center": True}, 2.0)],
)
def test_a_scale_of_a_number_and_of_a_tensor(settings, expected):
    assert SCALE(10.5, **settings) == expected  # 10.5 - 2 = 8.5, less 0.5, over 4
    assert_close(SCALE(tensor([10.5, math.nan]), **settings), tensor([expected, math.nan]), equal_nan=True)


def test_a_scale_that_is_not_known_changes_nothing():
    assert ScoreScale()(3.25, divide=True, center=True) == 3.25


def test_the_order_is_clip_then_penalties():
    scores, lengths = tensor([5.0, 5.0, -5.0, -0.5]), tensor([0, 10, 10, 4])
    finished = tensor([True, False, False, True])
    shaped = shaped_scores(scores, lengths, finished, clip=2.0, missing_eos_penalty=1.5, length_penalty=0.25)
    assert_close(shaped, tensor([2.0, 2.0 - 1.5 - 2.5, -2.0 - 1.5 - 2.5, -0.5 - 1.0]))


def test_what_nobody_has_scored_stays_so():
    shaped = shaped_scores(tensor([math.nan]), tensor([3]), tensor([False]), 1.0, 1.0, 1.0)
    assert shaped.isnan().all()


def test_without_penalties_scores_are_what_they_were():
    scores = torch.randn(5)
    assert torch.equal(shaped_scores(scores, torch.arange(5), torch.zeros(5, dtype=torch.bool)), scores)
