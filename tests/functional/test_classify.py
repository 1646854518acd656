import math

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from lit_rlhf.functional import added, classification_loss, side_by_side, wilson_interval


def test_states_of_both_orders_are_added_and_a_single_one_is_kept():
    hidden = tensor([[1.0, 2.0], [10.0, 20.0], [5.0, -1.0]])
    assert_close(added(hidden, tensor([0, 0, 1])), tensor([[11.0, 22.0], [5.0, -1.0]]))


def test_choices_stand_side_by_side_though_their_numbers_differ():
    table = side_by_side(tensor([1.0, 2.0, 3.0, 4.0, 5.0]), tensor([0, 0, 1, 1, 1]))
    assert_close(table, tensor([[1.0, 2.0, -math.inf], [3.0, 4.0, 5.0]]))


def test_the_softmax_is_over_the_choices_that_there_are():
    scores = tensor([0.0, math.log(3.0), 0.0, 0.0, 0.0], requires_grad=True)
    loss = classification_loss(side_by_side(scores, tensor([0, 0, 1, 1, 1])), tensor([1, 2]))
    assert_close(loss, tensor((math.log(4 / 3) + math.log(3.0)) / 2))
    loss.backward()
    assert_close(scores.grad, tensor([1 / 8, -1 / 8, 1 / 6, 1 / 6, -1 / 3]))


def test_loss_by_hand():  # GPT-1, eq. 4: -log softmax([0, log 3])[1] = -log 3/4; of two equal labels log 2
    logits = tensor([[0.0, math.log(3.0)], [5.0, 5.0]])
    assert_close(classification_loss(logits, tensor([1, 0])), tensor((math.log(4 / 3) + math.log(2.0)) / 2))
    assert classification_loss(logits.bfloat16(), tensor([1, 0])).dtype == torch.float32


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (8, 10, 0.4902, 0.9433), (50, 100, 0.4038, 0.5962), (10, 10, 0.7225, 1.0), (0, 0, 0.0, 1.0)],
)
def test_wilson_interval_by_hand(successes, n, low, high):
    assert_close(wilson_interval(successes, n), (low, high), atol=1e-4, rtol=0)
