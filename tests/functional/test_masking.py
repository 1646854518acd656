import math

import pytest
import torch
from hypothesis import given, strategies as st
from torch import tensor
from torch.testing import assert_close

from lit_rlhf.functional.masking import (
    last_position,
    masked_mean,
    masked_sum,
    moments,
    population_std,
    position_ids,
    power_sums,
    std_from_moments,
    whiten,
)

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


@st.composite
def batches(draw):
    """Values (B, T) in float64 and a mask, with a valid position in each row."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    mask = [draw(st.lists(st.booleans(), min_size=columns, max_size=columns).filter(any)) for _ in range(rows)]
    number = st.floats(-9, 9, allow_subnormal=False)
    return tensor([[draw(number) for _ in row] for row in mask], dtype=torch.float64), tensor(mask)


@given(batches(), st.integers(0, 2), st.integers(0, 2), st.randoms(use_true_random=False))
def test_neither_order_nor_padding_nor_what_is_masked_matters(batch, left, right, random):
    values, mask = batch
    order = random.sample(range(len(mask)), len(mask))
    values = values.requires_grad_()
    moved = torch.nn.functional.pad(values.masked_fill(~mask, NAN)[order], (left, right), value=NAN)
    moved_mask = torch.nn.functional.pad(mask[order], (left, right))
    for f in (masked_sum, masked_mean):
        assert_close(f(moved, moved_mask), f(values, mask))
        assert_close(f(moved, moved_mask, dim=-1), f(values, mask, dim=-1)[order])
    # not the gradient, so that values which hardly differ may be compared
    white = torch.nn.functional.pad(whiten(values, mask)[order], (left, right))
    assert_close(whiten(moved, moved_mask).detach(), white.detach(), rtol=0, atol=1e-4)
    masked_mean(moved, moved_mask).backward()
    assert_close(values.grad, mask.double() / mask.sum())
    assert torch.equal(last_position(moved_mask), last_position(mask)[order] + left)
    ids = position_ids(moved_mask)
    assert torch.equal(ids[:, left : left + mask.shape[1]], position_ids(mask)[order])


@given(batches())
def test_masking_against_loops(batch):
    values, mask = batch
    kept = [[x for x, m in zip(*row) if m] for row in zip(values.tolist(), mask.tolist())]
    flat = [x for row in kept for x in row]
    assert_close(masked_sum(values, mask, dim=-1).tolist(), [sum(row) for row in kept], rtol=0, atol=1e-9)
    assert_close(masked_mean(values, mask, dim=-1).tolist(), [sum(row) / len(row) for row in kept], rtol=0, atol=1e-9)
    assert_close(masked_mean(values, mask).item(), sum(flat) / len(flat), rtol=0, atol=1e-9)
    for row, last, ids in zip(mask.tolist(), last_position(mask).tolist(), position_ids(mask).tolist()):
        assert last == max(t for t, m in enumerate(row) if m)
        assert ids == [max(sum(row[: t + 1]) - 1, 0) for t in range(len(row))]


@given(batches(), batches())
def test_means_of_micro_batches_add_up_by_their_share(one, other):
    pad = torch.nn.functional.pad
    width = max(one[0].shape[1], other[0].shape[1])
    values, mask = (torch.cat([pad(x, (0, width - x.shape[1])) for x in both]) for both in zip(one, other))
    shares = [batch[1].sum() / mask.sum() for batch in (one, other)]
    recombined = sum(share * masked_mean(*batch) for share, batch in zip(shares, (one, other)))
    assert_close(masked_mean(values, mask), recombined.double(), rtol=1e-5, atol=1e-5)  # shares are float32


def test_a_scale_is_never_a_rounding_error():
    alike = torch.full((100,), 0.1)
    assert std_from_moments(*moments(power_sums(alike))) == 1 == std_from_moments(*moments(power_sums(alike[:0])))
    assert_close(std_from_moments(*moments(power_sums(tensor([1.0, 3.0])))), torch.ones((), dtype=torch.float64))


def test_whiten_adds_eps_to_the_variance():
    # variance 1 and eps 3: divided by 2
    assert_close(whiten(tensor([[3.0, 5.0]]), tensor([[True, True]]), eps=3.0), tensor([[-0.5, 0.5]]))
    # a deviation of 1e-4 is that of eps = 1e-8 too
    white = whiten(tensor([[-1e-4, 1e-4]], dtype=torch.float64), tensor([[True, True]]))
    assert_close(white, tensor([[-1.0, 1.0]], dtype=torch.float64) / math.sqrt(2))


def test_masking_gradcheck():
    values = torch.randn(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    mask = tensor([[True, True, False, True], [False, True, True, False]])
    for f in (masked_sum, masked_mean, whiten, lambda x, m: masked_mean(x, m, dim=0)):
        assert torch.autograd.gradcheck(lambda x, f=f: f(x, mask), values)


def test_half_precision_stays():
    values, mask = tensor([[1.0, 2.0]], dtype=torch.bfloat16), tensor([[True, True]])
    assert masked_sum(values, mask).dtype == masked_mean(values, mask).dtype == torch.bfloat16


def test_population_std_by_hand_and_of_nothing():
    assert_close(population_std(tensor([1.0, 3.0])), tensor(1.0))
    assert population_std(tensor([])).isnan()
