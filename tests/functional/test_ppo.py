import math

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from lit_rlhf.functional.ppo import clip_fraction, clipped_policy_loss, clipped_value_loss, explained_variance

NAN = float("nan")
ONE = tensor([[True]])


def batch():
    """Log-probs, old log-probs, advantages and mask, ragged on both sides, ratios well off the clip's kinks."""
    generator = torch.Generator().manual_seed(3)
    old, advantages, step = torch.randn(3, 3, 5, generator=generator, dtype=torch.float64)
    mask = tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    return old + 0.5 * step, old, advantages, mask


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),  # slope: d loss / d logprob = -ratio A where the clip does not hold
    [
        (2.0, 1.0, -1.2, 0.0),
        (2.0, -1.0, 2.0, 2.0),
        (0.5, 1.0, -0.5, -0.5),
        (0.5, -1.0, 0.8, 0.0),
        (1.1, 1.0, -1.1, -1.1),
        (1.1, -1.0, 1.1, 1.1),
        (0.9, -3.0, 2.7, 2.7),
    ],
)
def test_policy_clip_by_hand(ratio, advantage, loss, slope):
    logprobs = tensor([[math.log(ratio) - 1.0]], requires_grad=True)
    value = clipped_policy_loss(logprobs, tensor([[-1.0]]), tensor([[advantage]]), ONE, clip_range=0.2)
    value.backward()
    assert_close(value.detach(), tensor(loss))
    assert_close(logprobs.grad, tensor([[slope]]))


def test_policy_loss_is_a_mean_over_valid_tokens():
    logprobs = tensor([[-1.0, NAN, NAN], [-1.0, -2.0, -0.5]])  # ratio 1 throughout
    advantages = tensor([[6.0, 1e9, NAN], [1.0, 2.0, 3.0]])
    mask = tensor([[True, False, False], [True, True, True]])
    loss = clipped_policy_loss(logprobs, logprobs, advantages, mask, clip_range=0.2)
    assert_close(loss, tensor(-3.0))  # -12 / 4; the mean of row means would be -4


def test_policy_loss_against_loops():
    logprobs, old, advantages, mask = batch()
    terms = []
    for b, t in mask.nonzero().tolist():
        ratio, advantage = math.exp(logprobs[b, t] - old[b, t]), advantages[b, t].item()
        terms.append(min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage))
    assert_close(clipped_policy_loss(*batch(), clip_range=0.2).item(), -sum(terms) / len(terms))
    single = [x.float() if x.is_floating_point() else x for x in batch()]
    assert_close(clipped_policy_loss(*single, clip_range=0.2).item(), -sum(terms) / len(terms), rtol=1e-5, atol=1e-6)


def test_first_update_is_the_policy_gradient():  # at ratio 1 the gradient is -A / n
    _, old, advantages, mask = batch()
    logprobs = old.clone().requires_grad_()
    clipped_policy_loss(logprobs, old, advantages, mask, clip_range=0.2).backward()
    assert_close(logprobs.grad, torch.where(mask, -advantages / 11, 0.0))  # 3 + 3 + 5 valid tokens


def test_policy_loss_gradcheck():
    logprobs, old, advantages, mask = batch()
    assert torch.autograd.gradcheck(
        lambda x: clipped_policy_loss(x, old, advantages, mask, clip_range=0.2), logprobs.requires_grad_()
    )


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "slope"),  # c = 0.5
    [
        (2.0, 0.0, 1.0, 0.5, 1.0),  # clipped to 0.5: max(1, 0.25)
        (1.0, 0.0, 1.0, 0.125, 0.0),  # the clipped value is further off: max(0, 0.25), and holds the step
        (-1.0, 0.0, -1.0, 0.125, 0.0),  # the same downwards
        (-2.0, 0.0, 1.0, 4.5, -3.0),  # max(9, 2.25)
        (3.0, 1.0, 3.0, 1.125, 0.0),  # the range lies around the old value: 1.5 against 3
        (0.25, 0.0, 1.0, 0.28125, -0.75),  # inside the range: 0.5625 either way
    ],
)
def test_value_clip_by_hand(value, old, target, loss, slope):
    values = tensor([[value]], requires_grad=True)
    result = clipped_value_loss(values, tensor([[old]]), tensor([[target]]), ONE, value_clip_range=0.5)
    result.backward()
    assert_close(result.detach(), tensor(loss))
    assert_close(values.grad, tensor([[slope]]))


def test_value_loss_without_clip_is_half_the_squared_error_over_valid_tokens():
    values = tensor([[1.0, NAN], [5.0, 3.0]])
    returns = tensor([[3.0, 0.0], [5.0, -1.0]])
    mask = tensor([[True, False], [True, True]])
    assert_close(clipped_value_loss(values, torch.full((2, 2), NAN), returns, mask, None), tensor((4 + 0 + 16) / 6))


def test_value_loss_ignores_what_is_masked():
    # c = 1, old = 0. Valid: 0.5 against 1 gives 0.25; 3 against 3 is clipped to 1 and gives 4.
    values, returns = tensor([[NAN, 0.5, 3.0]]), tensor([[0.0, 1.0, 3.0]])
    loss = clipped_value_loss(values, tensor([[NAN, 0.0, 0.0]]), returns, tensor([[False, True, True]]), 1.0)
    assert_close(loss, tensor(4.25 / 4))


@pytest.mark.parametrize("clip", [None, 0.3])
def test_value_loss_gradcheck(clip):
    values, old, returns, mask = batch()
    assert torch.autograd.gradcheck(
        lambda x: clipped_value_loss(x, old, returns, mask, value_clip_range=clip), values.requires_grad_()
    )


def test_clip_fraction_counts_both_sides():
    ratios = tensor([[1.0, 1.1, 1.5, 9.0], [9.0, 0.5, 0.9, 0.7]])
    mask = tensor([[True, True, True, False], [False, True, True, True]])
    old = tensor([[-1.0, -2.0, -3.0, NAN], [NAN, -1.0, -2.0, -3.0]])
    assert_close(clip_fraction(ratios.log() + old, old, mask, clip_range=0.2), tensor(0.5))  # 1.5, 0.5 and 0.7 of six
    assert_close(clip_fraction(ratios.log() + old, old, mask, clip_range=0.4), tensor(2 / 6))


def test_explained_variance_by_hand():
    mask = tensor([[True, True, False]])
    returns = tensor([[0.0, 2.0, NAN]])  # variance 1
    for values, expected in [
        ([0.0, 2.0, NAN], 1.0),
        ([0.0, 1.0, NAN], 0.75),  # residuals 0 and 1: variance 1/4
        ([5.0, 5.0, 7.0], 0.0),
        ([2.0, 0.0, NAN], -3.0),  # residuals -2 and 2: variance 4
        ([10.0, 12.0, 0.0], 1.0),  # a constant offset is no variance
    ]:
        assert_close(explained_variance(tensor([values]), returns, mask), tensor(expected))


def test_explained_variance_is_over_all_valid_positions_together():
    # Row by row the returns are constant; together their variance is 1.
    returns, mask = tensor([[0.0, 0.0], [2.0, 2.0]]), torch.ones(2, 2, dtype=torch.bool)
    assert_close(explained_variance(0.5 * returns, returns, mask), tensor(0.75))


def test_explained_variance_of_constant_returns_is_zero():
    assert_close(explained_variance(tensor([[1.0, 2.0]]), tensor([[3.0, 3.0]]), torch.ones(1, 2).bool()), tensor(0.0))


def test_explained_variance_of_constant_returns_survives_rounding():
    values, mask = torch.arange(1.0, 7.0).view(2, 3), torch.ones(2, 3, dtype=torch.bool)
    for constant in torch.linspace(0.1, 3.0, 30):  # some of them have a rounded mean
        assert_close(explained_variance(values, constant.expand(2, 3), mask), tensor(0.0))


@pytest.mark.parametrize("hidden", [NAN, float("-inf"), -500.0])
def test_policy_gradient_ignores_what_is_masked(hidden):
    logprobs = tensor([[-1.0, -2.0]], requires_grad=True)
    loss = clipped_policy_loss(logprobs, tensor([[-1.0, hidden]]), tensor([[1.0, 1.0]]), tensor([[True, False]]), 0.2)
    loss.backward()
    assert_close(logprobs.grad, tensor([[-1.0, 0.0]]))


@pytest.mark.parametrize("clip", [None, 0.2])
def test_value_gradient_ignores_what_is_masked(clip):
    values = tensor([[0.0, 2.0]], requires_grad=True)
    clipped_value_loss(values, tensor([[0.0, NAN]]), tensor([[1.0, NAN]]), tensor([[True, False]]), clip).backward()
    assert_close(values.grad, tensor([[-1.0, 0.0]]))
