import math

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from lit_rlhf.functional.masking import last_position, masked_mean, masked_sum, position_ids, whiten

NAN = float("nan")
VALUES = tensor([[1.0, 2.0, NAN], [6.0, NAN, NAN]])
MASK = tensor([[True, True, False], [True, False, False]])


def test_masked_sum_counts_valid_positions_only():
    assert_close(masked_sum(VALUES, MASK), tensor(9.0))
    assert_close(masked_sum(VALUES, MASK, dim=-1), tensor([3.0, 6.0]))
    assert_close(masked_sum(VALUES, MASK, dim=0), tensor([7.0, 2.0, 0.0]))


def test_masked_mean_divides_by_the_number_of_valid_positions():
    assert_close(masked_mean(VALUES, MASK), tensor(3.0))  # 9 / 3; the mean of the row means would be 3.75
    assert_close(masked_mean(VALUES, MASK, dim=-1), tensor([1.5, 6.0]))


def test_masked_mean_of_nothing_is_zero():
    assert_close(masked_mean(tensor([[NAN, 1.0]]), tensor([[False, False]])), tensor(0.0))
    assert_close(masked_mean(VALUES, tensor([[True, True, False], [False] * 3]), dim=-1), tensor([1.5, 0.0]))


@pytest.mark.parametrize("hidden", [NAN, float("inf"), 1e30])
def test_masked_positions_get_no_gradient(hidden):
    values = tensor([[1.0, 2.0, hidden]], requires_grad=True)
    masked_mean(values, tensor([[True, True, False]])).backward()
    assert_close(values.grad, tensor([[0.5, 0.5, 0.0]]))


def test_whiten_by_hand_over_the_whole_batch():
    # Valid: 1, 3, 5. Mean 3, population variance 8/3, so (1 - 3) / sqrt(8/3) = -sqrt(3/2).
    # Row by row the lone 5 would become 0; with the unbiased deviation the ends would be -1 and 1.
    values = tensor([[1.0, 3.0, NAN], [NAN, NAN, 5.0]])
    mask = tensor([[True, True, False], [False, False, True]])
    assert_close(whiten(values, mask), tensor([[-math.sqrt(1.5), 0.0, 0.0], [0.0, 0.0, math.sqrt(1.5)]]))


def test_whiten_keeps_the_order_and_ignores_shift_and_scale():
    values = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.arange(6) < tensor([[6], [2], [4], [1]])
    white = whiten(values, mask)
    assert white[mask].argsort().tolist() == values[mask].argsort().tolist()
    assert_close(whiten(3 * values + 7, mask), white, rtol=0, atol=1e-7)
    assert_close(whiten(values.float(), mask).double(), white, rtol=0, atol=1e-5)


def test_whiten_of_equal_values_is_zero_and_finite():
    mask = tensor([[True, True, False]])
    assert_close(whiten(tensor([[2.0, 2.0, 9.0]]), mask), torch.zeros(1, 3))
    assert_close(whiten(tensor([[2.0, 5.0, 9.0]]), tensor([[False, True, False]])), torch.zeros(1, 3))


def test_last_position_with_padding_on_either_side():
    mask = tensor([[True, True, False, False], [False, False, True, True], [False, True, True, False], [True] * 4])
    assert last_position(mask).tolist() == [1, 3, 2, 3]
    assert last_position(tensor([[True, False, True, False]])).tolist() == [2]  # not count - 1 == 1


def test_last_position_refuses_an_empty_row():
    with pytest.raises(ValueError, match="no valid position"):
        last_position(tensor([[True, False], [False, False]]))


def test_position_ids_start_at_zero_on_the_first_real_token():
    mask = tensor([[False, False, True, True, True], [True, True, True, False, False], [True] * 5])
    ids = position_ids(mask)
    assert ids[0, 2:].tolist() == ids[1, :3].tolist() == [0, 1, 2]
    assert ids[2].tolist() == [0, 1, 2, 3, 4]
    assert ids.dtype == torch.int64 and ids.min() >= 0 and ids.max() < 5  # valid embedding indices at padding too
