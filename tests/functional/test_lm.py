import math

import pytest
import torch
from hypothesis import given, strategies as st
from torch import tensor
from torch.testing import assert_close

from lit_rlhf.functional.lm import lm_loss, token_entropy, token_logprobs

LN2 = math.log(2)


def random_logits(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3


def logprob(row, target):  # log softmax in float64, by loops
    return row[target] - math.log(sum(math.exp(x) for x in row))


def test_token_logprobs_by_hand():
    logits = tensor([[[0.5, 0.25, 0.25], [0.125, 0.125, 0.75]]]).log() + 5.0  # a constant changes nothing
    assert_close(token_logprobs(logits, tensor([[0, 1]])), tensor([[-LN2, -3 * LN2]]))


def test_token_logprobs_against_loops():
    logits, targets = random_logits(2, 3, 5), tensor([[0, 4, 2], [1, 1, 3]])
    expected = [[logprob(logits[b, t].tolist(), int(targets[b, t])) for t in range(3)] for b in range(2)]
    assert_close(token_logprobs(logits.float(), targets), tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target", [-100, -1, 2])
def test_a_target_that_is_no_token_has_no_logprob(target):
    with pytest.raises(IndexError):
        token_logprobs(torch.zeros(3, 2), tensor([0, target, 1]))
    with pytest.raises(IndexError):
        lm_loss(torch.zeros(1, 3, 2), tensor([[0, target, 1]]))


def test_token_logprobs_of_large_logits_stay_finite():
    assert_close(token_logprobs(tensor([[500.0, 0.0, -500.0]]), tensor([2])), tensor([-1000.0]))


def test_lm_loss_is_a_mean_over_tokens():
    # Uniform over 2 tokens once and over 8 three times: (1 + 9) / 4 ln 2. A mean of row means gives 2 ln 2.
    logits = torch.full((2, 3, 8), -1e9)
    logits[0, 0, :2] = 0.0
    logits[1] = 0.0
    mask = tensor([[True, False, False], [True, True, True]])
    assert_close(lm_loss(logits, torch.zeros(2, 3, dtype=torch.long), mask), tensor(2.5 * LN2))


def test_lm_loss_does_not_shift_the_labels():
    logits = tensor([[[0.5, 0.25, 0.25], [0.125, 0.125, 0.75]]]).log()
    loss = lm_loss(logits, tensor([[1, 2]]), torch.ones(1, 2, dtype=torch.bool))
    assert_close(loss, tensor(-(math.log(0.25) + math.log(0.75)) / 2))


def test_lm_loss_counts_the_last_token():  # end-of-text is learned
    logits = tensor([[[0.5, 0.5], [0.75, 0.25]]]).log()
    assert_close(lm_loss(logits, tensor([[0, 1]]), tensor([[False, True]])), tensor(2 * LN2))


def test_lm_loss_takes_any_label_and_logit_at_masked_positions():
    logits = torch.zeros(1, 3, 4)
    logits[0, 0] = float("nan")
    loss = lm_loss(logits, tensor([[-100, 3, -1]]), tensor([[False, True, False]]))
    assert_close(loss, tensor(2 * LN2))


def test_lm_loss_of_nothing_is_zero():
    loss = lm_loss(torch.randn(1, 2, 3), torch.full((1, 2), -100), torch.zeros(1, 2, dtype=torch.bool))
    assert_close(loss, tensor(0.0))


@pytest.mark.parametrize("left", [False, True])
def test_padding_does_not_change_the_lm_loss(left):
    logits, labels, mask = random_logits(2, 3, 5), tensor([[0, 4, 2], [1, 1, 3]]), torch.ones(2, 3, dtype=torch.bool)
    sides = (2, 0) if left else (0, 2)
    padded = [torch.nn.functional.pad(x, sides, value=v) for x, v in ((labels, -100), (mask, False))]
    padded_logits = torch.nn.functional.pad(logits, (0, 0, *sides), value=7.0)
    assert_close(lm_loss(padded_logits, *padded), lm_loss(logits, labels, mask))


def test_lm_loss_gradient_is_softmax_minus_one_hot_over_the_count():
    logits, labels = random_logits(2, 2, 4).float().requires_grad_(), tensor([[2, 0], [3, 1]])
    mask = tensor([[True, True], [True, False]])
    lm_loss(logits, labels, mask).backward()
    for b, t in ((0, 0), (0, 1), (1, 0), (1, 1)):
        row = logits[b, t].tolist()
        expected = [(math.exp(logprob(row, v)) - (v == int(labels[b, t]))) / 3 * int(mask[b, t]) for v in range(4)]
        assert_close(logits.grad[b, t], tensor(expected), rtol=1e-5, atol=1e-6)


def test_entropy_by_hand():
    probs = tensor([[0.25] * 4, [0.5, 0.25, 0.125, 0.125], [1.0, 1e-30, 1e-30, 1e-30]])
    assert_close(token_entropy(probs.log()), tensor([2.0, 1.75, 0.0]) * LN2)


def test_entropy_of_filtered_logits():
    assert_close(token_entropy(tensor([[0.0, 0.0, float("-inf")]])), tensor([LN2]))


def test_lm_loss_gradient_ignores_nan_at_masked_positions():
    logits = tensor([[[0.0, 0.0], [float("nan"), 0.0]]], requires_grad=True)
    lm_loss(logits, tensor([[0, 0]]), tensor([[True, False]])).backward()
    assert_close(logits.grad, tensor([[[-0.5, 0.5], [0.0, 0.0]]]))


def test_pretraining_counts_every_token():
    # No mask: 1, 1 and 2 bits, and the gradient softmax - one hot, over three tokens.
    logits = tensor([[[0.5, 0.25, 0.25]] * 3]).log().requires_grad_()
    loss = lm_loss(logits, tensor([[0, 0, 2]]))
    loss.backward()
    assert_close(loss.detach(), tensor(4 / 3 * LN2))
    assert_close(logits.grad, tensor([[[-0.5, 0.25, 0.25], [-0.5, 0.25, 0.25], [0.5, 0.25, -0.75]]]) / 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_left_before_the_softmax(dtype):
    # Logits that half precision holds, log-probs that it does not: -ln(1 + 255) = -5.5452, entropy of 256 tokens.
    logits = torch.zeros(1, 256, dtype=dtype)
    assert_close(token_logprobs(logits, tensor([3])), tensor([-8 * LN2]))
    assert_close(token_entropy(logits), tensor([8 * LN2]))
    assert_close(lm_loss(logits[None], tensor([[3]]), tensor([[True]])), tensor(8 * LN2))
    assert token_logprobs(logits.double(), tensor([3])).dtype == token_entropy(logits.double()).dtype == torch.float64


@given(st.lists(st.floats(-8, 8, allow_subnormal=False), min_size=2, max_size=6), st.floats(-50, 50))
def test_entropy_and_logprobs_against_loops_whatever_the_offset(row, offset):
    logits = tensor([row], dtype=torch.float64) + offset
    logs = [logprob(row, v) for v in range(len(row))]
    assert_close(token_logprobs(logits.expand(len(row), -1), torch.arange(len(row))).tolist(), logs, rtol=0, atol=1e-9)
    assert_close(token_entropy(logits).item(), -sum(math.exp(x) * x for x in logs), rtol=0, atol=1e-9)
    assert -1e-12 <= token_entropy(logits).item() <= math.log(len(row)) + 1e-12


@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 999))
def test_losses_of_micro_batches_add_up_by_their_share_of_the_tokens(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2 * rows, columns, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(3, (2 * rows, columns), generator=generator)
    mask = torch.rand(2 * rows, columns, generator=generator) < 0.6
    parts = [[x[i::2] for x in (logits, labels, mask)] for i in (0, 1)]
    recombined = sum(lm_loss(*part) * part[-1].sum() for part in parts) / mask.sum().clamp(min=1)
    assert_close(lm_loss(logits, labels, mask), recombined)


def test_lm_gradcheck():
    logits, labels, mask = random_logits(2, 2, 4).requires_grad_(), tensor([[2, 0], [3, 1]]), tensor([[1, 1], [1, 0]])
    assert torch.autograd.gradcheck(lambda x: lm_loss(x, labels, mask.bool()), logits)
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x, labels), logits)
    assert torch.autograd.gradcheck(token_entropy, logits)
