import math
from functools import partial

import pytest
import torch
from hypothesis import given, strategies as st
from torch import tensor
from torch.testing import assert_close

from lit_rlhf.functional.ppo import (
    adapted_beta,
    clip_fraction,
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    importance_weighted_loss,
    kl_penalty_loss,
    policy_gradient_loss,
)

NAN = float("nan")
ONE = tensor([[True]])
POLICY_LOSSES = {
    "policy_gradient": policy_gradient_loss,
    "importance_weighted": importance_weighted_loss,
    "kl_penalty": partial(kl_penalty_loss, beta=0.7),
    "clipped": partial(clipped_policy_loss, clip_range=0.2),
}
LOSSES = {  # all of them map three (B, T) tensors and a mask to a mean over valid tokens
    **POLICY_LOSSES,
    "value": partial(clipped_value_loss, value_clip_range=None),
    "clipped_value": partial(clipped_value_loss, value_clip_range=0.3),
}
each_policy_loss = pytest.mark.parametrize("loss", POLICY_LOSSES.values(), ids=POLICY_LOSSES)
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def batch():
    """Log-probs, old log-probs, advantages and mask, ragged on both sides, ratios well off the clip's kinks."""
    generator = torch.Generator().manual_seed(3)
    old, advantages, step = torch.randn(3, 3, 5, generator=generator, dtype=torch.float64)
    mask = tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    return old + 0.5 * step, old, advantages, mask


def terms(f):
    """Mean of ``f(ratio, advantage)`` over the valid tokens of :func:`batch`, by loops."""
    logprobs, old, advantages, mask = batch()
    return sum(
        f(math.exp(logprobs[b, t] - old[b, t]), advantages[b, t].item()) for b, t in mask.nonzero().tolist()
    ) / int(mask.sum())


def gradient(loss, x, *rest):
    x = x.detach().clone().requires_grad_()
    loss(x, *rest).backward()
    return x.grad


@st.composite
def ragged(draw, least=1):
    """Three tensors (B, T) in float64 and a mask with at least one valid token, drawn by a seed."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    rows, columns = draw(st.integers(least, 4)), draw(st.integers(1, 5))
    x, y, z = torch.randn(3, rows, columns, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, columns, generator=generator) < 0.6
    mask[draw(st.integers(0, rows - 1)), draw(st.integers(0, columns - 1))] = True
    return x, y, z, mask


@each_policy_loss
def test_at_the_policy_that_sampled_the_gradient_is_the_policy_gradient(loss):  # -A / n, whichever loss
    _, old, advantages, mask = batch()
    expected = torch.where(mask, -advantages / 11, 0.0)  # 3 + 3 + 5 valid tokens
    assert_close(gradient(loss, old, old, advantages, mask), expected)


@each_loss
@given(ragged(), st.integers(0, 2), st.integers(0, 2), st.randoms(use_true_random=False))
def test_neither_order_nor_padding_nor_what_is_masked_matters(loss, batch, left, right, random):
    *inputs, mask = batch
    order = random.sample(range(len(mask)), len(mask))
    hidden = [NAN, math.inf, -math.inf, 1e9]
    moved = [
        torch.nn.functional.pad(x.masked_fill(~mask, random.choice(hidden))[order], (left, right), value=NAN)
        for x in inputs
    ]
    moved_mask = torch.nn.functional.pad(mask[order], (left, right))
    assert_close(loss(*moved, moved_mask), loss(*inputs, mask))
    expected = torch.nn.functional.pad(gradient(loss, *inputs, mask)[order], (left, right))
    assert_close(gradient(loss, *moved, moved_mask), expected)


@each_loss
@given(ragged(least=4))
def test_micro_batches_add_up_by_their_share_of_the_tokens(loss, batch):
    whole, gradients = loss(*batch), gradient(loss, *batch)
    parts = [[x[i : i + 2] for x in batch] for i in (0, 2)]
    shares = [part[-1].sum() / batch[-1].sum() for part in parts]
    assert_close(sum(share * loss(*part) for share, part in zip(shares, parts)), whole)
    assert_close(torch.cat([share * gradient(loss, *part) for share, part in zip(shares, parts)]), gradients)


@each_loss
def test_losses_gradcheck(loss):
    x, *rest = batch()
    assert torch.autograd.gradcheck(lambda x: loss(x, *rest), x.requires_grad_())


@each_loss
def test_no_valid_token_is_no_loss(loss):
    x, y, z, mask = batch()
    assert loss(x, y, z, torch.zeros_like(mask)).item() == 0


@each_policy_loss
@given(ragged(), st.floats(0, 10))
def test_twice_the_advantages_are_twice_the_loss(loss, batch, factor):
    logprobs, old, advantages, mask = batch
    if loss is POLICY_LOSSES["kl_penalty"]:  # its beta is in the same unit
        scaled = kl_penalty_loss(logprobs, old, factor * advantages, mask, beta=factor * 0.7)
    else:
        scaled = loss(logprobs, old, factor * advantages, mask)
    assert_close(scaled, factor * loss(*batch))


@given(ragged(), st.floats(0.01, 3))
def test_what_the_losses_have_in_common(batch, clip):
    logprobs, old, advantages, mask = batch
    plain = importance_weighted_loss(*batch)
    assert_close(kl_penalty_loss(*batch, beta=0.0), plain)
    assert kl_penalty_loss(*batch, beta=clip) >= plain - 1e-12  # a divergence is never below 0
    assert clipped_policy_loss(*batch, clip_range=clip) >= plain - 1e-12  # clipping only ever takes gains away
    assert_close(clipped_policy_loss(*batch, clip_range=1e9), plain)
    # importance weights times the policy gradient
    ratios = (logprobs - old).exp()
    assert_close(
        policy_gradient_loss(logprobs, old, ratios * advantages, mask).detach(),
        -(torch.where(mask, ratios * advantages * logprobs, 0.0).sum() / mask.sum()),
    )
    assert_close(
        gradient(policy_gradient_loss, logprobs, old, ratios * advantages, mask),
        gradient(importance_weighted_loss, logprobs, old, advantages, mask),
    )


def test_policy_gradient_loss_by_hand():
    logprobs, advantages = tensor([[-1.0, -2.0, NAN], [-0.5, NAN, NAN]]), tensor([[3.0, -1.0, NAN], [4.0, 7.0, NAN]])
    mask = tensor([[True, True, False], [True, False, False]])
    # (-3 + 2 - 2) / 3, negated; the policy that sampled is not looked at
    assert_close(policy_gradient_loss(logprobs, torch.full((2, 3), NAN), advantages, mask), tensor(1.0))


def test_importance_weighted_loss_by_hand():
    old = tensor([[-1.0, -2.0, NAN]])
    logprobs = old + tensor([[2.0, 0.5, 1.0]]).log()
    loss = importance_weighted_loss(logprobs, old, tensor([[3.0, -4.0, 9.0]]), tensor([[True, True, False]]))
    assert_close(loss, tensor(-2.0))  # (2 * 3 - 0.5 * 4) / 2
    assert_close(importance_weighted_loss(*batch()).item(), -terms(lambda ratio, a: ratio * a))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),  # beta 1/2: -(rho A - (rho - 1 - ln rho) / 2), slope (rho - 1) / 2 - rho A
    [
        (1.0, 3.0, -3.0, -3.0),
        (2.0, 1.0, -1.5 - math.log(2) / 2, -1.5),
        (0.5, 1.0, -0.75 + math.log(2) / 2, -0.75),
        (2.0, 0.0, 0.5 - math.log(2) / 2, 0.5),
        (0.5, 0.0, math.log(2) / 2 - 0.25, -0.25),  # the penalty pulls back from either side
    ],
)
@pytest.mark.parametrize("beta", [0.5, tensor(0.5)])
def test_kl_penalty_loss_by_hand(ratio, advantage, loss, slope, beta):
    logprobs = tensor([[math.log(ratio) - 1.0]], requires_grad=True)
    value = kl_penalty_loss(logprobs, tensor([[-1.0]]), tensor([[advantage]]), ONE, beta)
    value.backward()
    assert_close(value.detach(), tensor(loss))
    assert_close(logprobs.grad, tensor([[slope]]))


def test_kl_penalty_loss_against_loops():
    expected = -terms(lambda ratio, a: ratio * a - 0.7 * (ratio - 1 - math.log(ratio)))
    assert_close(kl_penalty_loss(*batch(), beta=0.7).item(), expected)


def test_the_expected_penalty_is_the_divergence_from_the_policy_that_sampled():
    """Its gradient too. Tokens in proportion to 1/2, 3/8 and 1/8; KL(pi_old || pi) with pi = (1/4, 1/4, 1/2)."""
    tokens = [0] * 4 + [1] * 3 + [2]
    old = tensor([0.5, 0.375, 0.125], dtype=torch.float64).log()[tokens][:, None]
    logits = tensor([0.25, 0.25, 0.5], dtype=torch.float64).log().requires_grad_()
    logprobs = logits.log_softmax(-1)[tokens][:, None]
    loss = kl_penalty_loss(logprobs, old, torch.zeros_like(old), torch.ones(8, 1, dtype=torch.bool), beta=2.0)
    loss.backward()
    assert_close(loss.item(), 2 * (0.5 * math.log(2) + 0.375 * math.log(1.5) + 0.125 * math.log(0.25)))
    assert_close(logits.grad, 2 * tensor([0.25 - 0.5, 0.25 - 0.375, 0.5 - 0.125], dtype=torch.float64))  # pi - pi_old


@pytest.mark.parametrize(
    ("kl", "expected"),  # beta 0.8, target 0.03
    [(0.0, 0.4), (0.0199, 0.4), (0.0201, 0.8), (0.03, 0.8), (0.0449, 0.8), (0.0451, 1.6), (9.0, 1.6)],
)
def test_adapted_beta_by_hand(kl, expected):
    assert_close(adapted_beta(0.8, kl, target=0.03), expected)


def test_adapted_beta_stays_at_its_bounds():  # "below" and "above"
    assert adapted_beta(1.0, kl=2.0, target=3.0) == adapted_beta(1.0, kl=4.5, target=3.0) == 1.0


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
    expected = -terms(lambda ratio, a: min(ratio * a, min(max(ratio, 0.8), 1.2) * a))
    assert_close(clipped_policy_loss(*batch(), clip_range=0.2).item(), expected)
    single = [x.float() if x.is_floating_point() else x for x in batch()]
    assert_close(clipped_policy_loss(*single, clip_range=0.2).item(), expected, rtol=1e-5, atol=1e-6)


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


def test_clip_fraction_counts_both_sides():
    ratios = tensor([[1.0, 1.1, 1.5, 9.0], [9.0, 0.5, 0.9, 0.7]])
    mask = tensor([[True, True, True, False], [False, True, True, True]])
    old = tensor([[-1.0, -2.0, -3.0, NAN], [NAN, -1.0, -2.0, -3.0]])
    assert_close(clip_fraction(ratios.log() + old, old, mask, clip_range=0.2), tensor(0.5))  # 1.5, 0.5 and 0.7 of six
    assert_close(clip_fraction(ratios.log() + old, old, mask, clip_range=0.4), tensor(2 / 6))


def test_a_ratio_at_the_bound_has_not_left_the_range():
    assert clip_fraction(tensor([[-1.0]]), tensor([[-1.0]]), ONE, clip_range=0.0).item() == 0


def test_clip_fraction_is_where_the_clipped_loss_may_lose_its_gradient():
    logprobs, old, _, mask = batch()
    held = [gradient(POLICY_LOSSES["clipped"], logprobs, old, torch.full_like(old, a), mask) == 0 for a in (1.0, -1.0)]
    expected = ((held[0] | held[1]) & mask).sum() / mask.sum()
    assert_close(clip_fraction(logprobs, old, mask, clip_range=0.2), expected)
    assert 0 < expected < 1


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


def test_explained_variance_of_returns_that_vary_little_beside_their_size():
    returns = tensor([[99.95, 100.05, 99.95, 100.05]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    assert_close(explained_variance(returns, returns, mask), tensor(1.0))
    halved = torch.full_like(returns, 100.0) + tensor([[-1, 1, -1, 1]]) * 0.025
    assert_close(explained_variance(halved, returns, mask), tensor(0.75), rtol=0, atol=1e-3)


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


@given(ragged(), st.floats(-5, 5), st.floats(0.1, 5), st.randoms(use_true_random=False))
def test_explained_variance_against_loops_whatever_scale_and_order(batch, shift, scale, random):
    values, returns, _, mask = batch
    order = random.sample(range(len(mask)), len(mask))
    hidden = [torch.nn.functional.pad(x.masked_fill(~mask, NAN)[order], (1, 0), value=NAN) for x in (values, returns)]
    found = explained_variance(
        scale * hidden[0] + shift, scale * hidden[1], torch.nn.functional.pad(mask[order], (1, 0))
    )
    residuals, targets = (returns - values)[mask].tolist(), returns[mask].tolist()
    spread = [sum((x - sum(xs) / len(xs)) ** 2 for x in xs) for xs in (residuals, targets)]
    assert_close(found.item(), 1 - spread[0] / spread[1] if len(targets) > 1 else 0.0, rtol=1e-7, atol=1e-7)
