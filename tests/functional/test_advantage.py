import math
import statistics
from itertools import product

import pytest
import torch
from hypothesis import given, strategies as st
from torch import tensor
from torch.testing import assert_close

from lit_rlhf.functional.advantage import (
    baseline,
    gae,
    group_std,
    monte_carlo,
    reward_to_go,
    token_rewards,
    whole_answer,
)

NAN = float("nan")
ALL3 = torch.ones(1, 3, dtype=torch.bool)


def ragged(hidden=0.0):
    """Rewards, values and mask of rows padded on the right, on the left, on both sides and not at all."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
    start, end = tensor([[0], [3], [1], [0]]), tensor([[4], [6], [2], [6]])
    mask = (torch.arange(6) >= start) & (torch.arange(6) < end)
    return rewards.masked_fill(~mask, hidden), values.masked_fill(~mask, hidden), mask


def gae_by_double_sum(rewards, values, mask, gamma, lam):  # arXiv:1506.02438, eq. 16, by loops
    advantages = torch.zeros_like(values)
    for b in range(len(values)):
        steps = mask[b].nonzero().flatten().tolist()
        v = [values[b, t].item() for t in steps] + [0.0]
        delta = [rewards[b, t].item() + gamma * v[i + 1] - v[i] for i, t in enumerate(steps)]
        for i, t in enumerate(steps):
            advantages[b, t] = sum((gamma * lam) ** step * d for step, d in enumerate(delta[i:]))
    return advantages


@st.composite
def batches(draw):
    """Rewards, values (float64) and mask; each row has one run of valid positions, padding hidden behind NaN."""
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    runs = [sorted(draw(st.tuples(*[st.integers(0, columns - 1)] * 2))) for _ in range(rows)]
    mask = tensor([[first <= t <= last for t in range(columns)] for first, last in runs])
    number = st.floats(-5, 5, allow_subnormal=False)
    rewards, values = (
        tensor([[draw(number) if m else NAN for m in row] for row in mask.tolist()], dtype=torch.float64)
        for _ in range(2)
    )
    return rewards, values, mask


def padded(x, left, right, value=NAN):
    return torch.nn.functional.pad(x, (left, right), value=value)


def groups():
    """Returns of 1 to 4 prompts with 2 to 5 answers each, as lists."""
    answers = st.floats(-9, 9, allow_subnormal=False)
    return st.integers(2, 5).flatmap(
        lambda k: st.lists(st.lists(answers, min_size=k, max_size=k), min_size=1, max_size=4)
    )


def flat(x):
    return tensor(x, dtype=torch.float64).flatten()


def test_token_rewards_by_hand_with_padding_on_either_side():
    penalties = tensor([[0.5, -0.5, NAN, NAN], [NAN, NAN, 1.0, 0.25], [NAN, 0.0, NAN, 3.0]])
    mask = tensor([[True, True, False, False], [False, False, True, True], [False, True, False, False]])
    rewards = token_rewards(tensor([10.0, -4.0, 7.0]), penalties, mask)
    # less the penalty, plus the score on the last real token
    assert_close(rewards, tensor([[-0.5, 10.5, 0.0, 0.0], [0.0, 0.0, -1.0, -4.25], [0.0, 7.0, 0.0, 0.0]]))


def test_the_score_reaches_exactly_the_last_real_token():
    penalties, _, mask = ragged(hidden=NAN)
    scores = tensor([1.0, 2.0, 3.0, 4.0])  # float32 beside float64
    rewards = token_rewards(scores, torch.zeros_like(penalties).masked_fill(~mask, NAN), mask)
    expected = torch.zeros_like(penalties)
    for row, last in enumerate([3, 5, 1, 5]):
        expected[row, last] = scores[row]
    assert_close(rewards, expected)


def test_rewards_add_up_to_the_score_less_the_penalties():  # InstructGPT, eq. 2
    penalties, _, mask = ragged(hidden=NAN)
    rewards = token_rewards(tensor([1.0, 2.0, 3.0, 4.0]), penalties, mask)
    for row in range(4):
        total = sum(penalties[row, t].item() for t in range(6) if mask[row, t])
        assert_close(rewards[row].sum().item(), row + 1 - total)


def test_token_rewards_gradient_is_one_for_the_score_and_minus_one_for_each_penalty():
    penalties, scores = tensor([[1.0, 2.0, NAN]], requires_grad=True), tensor([5.0], requires_grad=True)
    token_rewards(scores, penalties, tensor([[True, True, False]])).sum().backward()
    assert_close(penalties.grad, tensor([[-1.0, -1.0, 0.0]]))
    assert_close(scores.grad, tensor([1.0]))


def test_whole_answer_is_one_action_an_answer():
    x = tensor([[1.0, 2.0, NAN], [NAN, NAN, 5.0], [1.0, -1.0, 4.0]], requires_grad=True)
    mask = tensor([[True, True, False], [False, False, True], [True, True, True]])
    whole = whole_answer(x, mask)
    assert_close(whole.detach(), tensor([[3.0], [5.0], [4.0]]))
    whole.sum().backward()
    assert_close(x.grad, mask.float())


def test_reward_to_go_by_hand():
    # gamma 1/2, from the back: 4, 2 + 4/2 = 4, 1 + 4/2 = 3
    assert_close(reward_to_go(tensor([[1.0, 2.0, 4.0]]), ALL3, gamma=0.5), tensor([[3.0, 4.0, 4.0]]))
    assert_close(reward_to_go(tensor([[1.0, 2.0, 4.0]]), ALL3), tensor([[7.0, 6.0, 4.0]]))
    assert_close(reward_to_go(tensor([[1.0, 2.0, 4.0]]), ALL3, gamma=0.0), tensor([[1.0, 2.0, 4.0]]))


@given(batches(), st.floats(0, 1))
def test_reward_to_go_is_the_sum_over_what_follows(batch, gamma):
    rewards, _, mask = batch
    returns = reward_to_go(rewards, mask, gamma)
    for b, row in enumerate(mask.tolist()):
        for t, valid in enumerate(row):
            ahead = [(s - t, rewards[b, s].item()) for s in range(t, len(row)) if row[s]]
            assert_close(returns[b, t].item(), sum(gamma**d * r for d, r in ahead) if valid else 0.0, rtol=0, atol=1e-9)


@given(batches(), st.floats(0, 1))
def test_reward_to_go_is_what_a_critic_aims_at_with_lambda_one(batch, gamma):
    rewards, values, mask = batch
    assert_close(gae(rewards, values, mask, gamma, lam=1.0)[1], reward_to_go(rewards, mask, gamma), rtol=0, atol=1e-9)


@given(batches(), st.floats(0, 1), st.floats(0, 1), st.floats(-3, 3))
def test_advantages_are_linear_in_rewards_and_values_together(batch, gamma, lam, factor):
    rewards, values, mask = batch
    once = gae(rewards, values, mask, gamma, lam)
    mixed = gae(factor * rewards + values, factor * values - rewards, mask, gamma, lam)
    other = gae(values, -rewards, mask, gamma, lam)
    for a, b, c in zip(once, other, mixed):
        assert_close(factor * a + b, c, rtol=0, atol=1e-9)
    to_go = factor * reward_to_go(rewards, mask, gamma) + reward_to_go(values, mask, gamma)
    assert_close(reward_to_go(factor * rewards + values, mask, gamma), to_go, rtol=0, atol=1e-9)


@given(batches(), st.integers(0, 2), st.integers(0, 2), st.randoms(use_true_random=False))
def test_neither_the_order_of_answers_nor_padding_matters(batch, left, right, random):
    rewards, values, mask = batch
    order = random.sample(range(len(mask)), len(mask))
    scores = torch.arange(1.0, len(mask) + 1, dtype=torch.float64)
    for f, inputs in [
        (lambda r, v, m: gae(r, v, m, 0.9, 0.8)[0], (rewards, values)),
        (lambda r, v, m: gae(r, v, m, 0.9, 0.8)[1], (rewards, values)),
        (lambda r, m: reward_to_go(r, m, 0.9), (rewards,)),
    ]:
        moved = f(*(padded(x[order], left, right) for x in inputs), padded(mask[order], left, right, False))
        assert torch.equal(moved, padded(f(*inputs, mask)[order], left, right, 0.0))
    moved = token_rewards(scores[order], padded(rewards[order], left, right), padded(mask[order], left, right, False))
    assert torch.equal(moved, padded(token_rewards(scores, rewards, mask)[order], left, right, 0.0))
    whole = whole_answer(padded(rewards[order], left, right), padded(mask[order], left, right, False))
    assert_close(whole, whole_answer(rewards, mask)[order])


def test_baselines_by_hand():
    returns = tensor([1.0, 3.0, 8.0, 2.0, 4.0, 6.0])  # two prompts, three answers each
    assert_close(baseline(returns, "none"), torch.zeros(6))
    assert_close(baseline(returns, "batch"), torch.full((6,), 4.0))
    assert_close(baseline(returns, "prompt", 3), tensor([4.0, 4.0, 4.0, 4.0, 4.0, 4.0]))
    assert_close(baseline(returns, "others", 3), tensor([5.5, 4.5, 2.0, 5.0, 4.0, 3.0]))
    # three prompts, two answers each: neighbours belong together
    assert_close(baseline(returns, "prompt", 2), tensor([2.0, 2.0, 5.0, 5.0, 5.0, 5.0]))
    assert_close(baseline(returns, "others", 2), tensor([3.0, 1.0, 2.0, 8.0, 6.0, 4.0]))


def test_group_std_by_hand():
    # 1, 3, 8: mean 4, squares 9 + 1 + 16 = 26 over K - 1 = 2. 2, 4, 6: 8 / 2.
    std = group_std(tensor([1.0, 3.0, 8.0, 2.0, 4.0, 6.0]), 3)
    assert_close(std, tensor([math.sqrt(13)] * 3 + [2.0] * 3))


def test_what_nobody_scored_is_in_no_baseline():
    returns = tensor([1.0, 5.0, 99.0, 2.0, 99.0, 99.0])  # two prompts, three answers each; 99: nobody scored it
    scored = returns < 99
    assert_close(baseline(returns, "batch", mask=scored), torch.full((6,), 8 / 3))
    assert_close(baseline(returns, "prompt", 3, scored), tensor([3.0, 3.0, 3.0, 2.0, 2.0, 2.0]))
    others = baseline(returns, "others", 3, scored)
    assert_close(others[:2], tensor([5.0, 1.0]))
    assert_close(group_std(returns, 3, scored)[:3], torch.full((3,), math.sqrt(8)))  # (4 + 4) / (2 - 1)
    for f in (baseline(returns, "prompt", 3, scored & False), group_std(returns, 3, scored & False), others):
        assert f.isfinite().all()


@pytest.mark.parametrize("k", [1, 0, 4])  # too few, or no divisor of six
@pytest.mark.parametrize("f", [group_std, lambda x, k: baseline(x, "prompt", k), lambda x, k: baseline(x, "others", k)])
def test_comparing_takes_two_answers_to_each_prompt(f, k):
    with pytest.raises(ValueError, match=f"6 answers, {k} per prompt"):
        f(torch.zeros(6), k)


@given(groups())
def test_baselines_and_deviations_against_loops(returns):
    k, x = len(returns[0]), flat(returns)
    prompt = [sum(g) / k for g in returns for _ in g]
    others = [sum(r for j, r in enumerate(g) if j != i) / (k - 1) for g in returns for i in range(k)]
    deviation = [statistics.stdev(g) for g in returns for _ in g]
    assert_close(baseline(x, "prompt", k), flat(prompt), rtol=0, atol=1e-9)
    assert_close(baseline(x, "others", k), flat(others), rtol=0, atol=1e-9)
    assert_close(baseline(x, "batch"), flat([sum(prompt) / len(prompt)] * len(prompt)), rtol=0, atol=1e-9)
    assert_close(group_std(x, k), flat(deviation), rtol=0, atol=1e-7)


@given(groups(), st.floats(-3, 3), st.floats(-10, 10), st.randoms(use_true_random=False))
def test_baselines_follow_scale_shift_and_order(returns, scale, shift, random):
    k, x = len(returns[0]), flat(returns)
    moved = [random.sample(g, k) for g in random.sample(returns, len(returns))]
    for kind in ("batch", "prompt", "others"):
        known = baseline(x, kind, k)
        assert_close(baseline(scale * x + shift, kind, k), scale * known + shift, rtol=0, atol=1e-9)
        advantages = sorted(zip(x.tolist(), (x - known).tolist()))
        again = sorted(zip(flat(moved).tolist(), (flat(moved) - baseline(flat(moved), kind, k)).tolist()))
        assert_close(flat(again), flat(advantages), rtol=0, atol=1e-9)
    assert_close(group_std(scale * x + shift, k), abs(scale) * group_std(x, k), rtol=0, atol=1e-7)


@given(groups(), st.floats(0.5, 3), st.floats(-10, 10))
def test_advantages_in_deviations_ignore_the_scale_of_rewards(returns, scale, shift):  # GRPO, section 4.1
    k = len(returns[0])
    x = flat([[r + 20 * i for i, r in enumerate(g)] for g in returns])  # apart: a deviation above 0

    def advantages(x):
        return (x - baseline(x, "prompt", k)) / group_std(x, k)

    assert_close(advantages(scale * x + shift), advantages(x), rtol=0, atol=1e-7)
    # a mean square of 1 with the divisor K - 1
    assert_close(advantages(x).view(-1, k).square().sum(1) / (k - 1), torch.ones(len(returns), dtype=torch.float64))


@pytest.mark.parametrize(("kind", "share"), [("none", 1.0), ("others", 1.0), ("prompt", 2 / 3), ("batch", 2 / 3)])
def test_expected_gradient_of_a_baseline(kind, share):
    """A choice of three, drawn three times, all 27 outcomes weighed by their probability. An answer that is its own
    baseline takes 1/3 of the gradient away."""
    probs, rewards = [0.5, 0.3, 0.2], tensor([1.0, -2.0, 4.0], dtype=torch.float64)
    gradient = torch.zeros(3, dtype=torch.float64)
    for drawn in product(range(3), repeat=3):
        returns = rewards[list(drawn)]
        for a, advantage in zip(drawn, returns - baseline(returns, kind, 3)):
            log_derivative = torch.eye(3, dtype=torch.float64)[a] - flat(probs)
            gradient += math.prod(probs[i] for i in drawn) * advantage * log_derivative / 3
    mean = 0.5 * 1.0 - 0.3 * 2.0 + 0.2 * 4.0
    exact = flat([p * (r - mean) for p, r in zip(probs, rewards.tolist())])  # d E[r] / d logits
    assert_close(gradient, share * exact)


def test_gae_by_hand():
    # gamma = lam = 1/2. Deltas: 0 + .5 * .25 - .5 = -.375, 0 + .5 * 1 - .25 = .25, 2 + 0 - 1 = 1.
    # Advantages with gamma lam = 1/4: A_3 = 1, A_2 = .25 + 1/4 = .5, A_1 = -.375 + .5 / 4 = -.25.
    advantages, returns = gae(tensor([[0.0, 0.0, 2.0]]), tensor([[0.5, 0.25, 1.0]]), ALL3, gamma=0.5, lam=0.5)
    assert_close(advantages, tensor([[-0.25, 0.5, 1.0]]))
    assert_close(returns, tensor([[0.25, 0.75, 2.0]]))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (0.9, 0.0), (0.7, 1.0), (1.0, 1.0)])
def test_gae_is_the_double_sum_with_padding_on_either_side(gamma, lam):
    rewards, values, mask = ragged(hidden=NAN)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    expected = gae_by_double_sum(rewards, values, mask, gamma, lam)
    assert_close(advantages, expected)
    assert_close(returns, torch.where(mask, expected + values, 0.0))
    assert_close(gae(rewards.float(), values.float(), mask, gamma, lam)[0].double(), expected, rtol=1e-5, atol=1e-5)


def test_lambda_zero_is_the_td_error_and_lambda_one_the_discounted_return():
    rewards, values = tensor([[1.0, 2.0, 4.0]]), tensor([[3.0, 5.0, 7.0]])
    # 1 + .5 * 5 - 3, 2 + .5 * 7 - 5, 4 - 7
    assert_close(gae(rewards, values, ALL3, gamma=0.5, lam=0.0)[0], tensor([[0.5, 0.5, -3.0]]))
    # returns 1 + 2/2 + 4/4, 2 + 4/2, 4: the values cancel
    assert_close(gae(rewards, values, ALL3, gamma=0.5, lam=1.0)[1], tensor([[3.0, 4.0, 4.0]]))


@pytest.mark.parametrize("hidden", [NAN, float("inf"), 1e6])
def test_what_stands_in_the_padding_does_not_leak(hidden):
    clean = gae(*ragged(), gamma=0.9, lam=0.8)
    dirty = gae(*ragged(hidden), gamma=0.9, lam=0.8)
    mask = ragged()[2]
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)
        assert (b[~mask] == 0).all()


def test_the_last_value_does_not_bootstrap():  # an answer is an episode: after it the value is 0
    advantages, _ = gae(tensor([[0.0, 0.0, 1.0]]), tensor([[0.0, 0.0, 0.25]]), ALL3, gamma=1.0, lam=1.0)
    assert_close(advantages[0, -1], tensor(0.75))


def test_inputs_are_left_alone():
    rewards, values, mask = ragged(hidden=3.0)
    copies = rewards.clone(), values.clone(), mask.clone()
    gae(rewards, values, mask, gamma=0.9, lam=0.8)
    token_rewards(torch.ones(4, dtype=torch.float64), rewards, mask)
    reward_to_go(rewards, mask, gamma=0.9)
    whole_answer(rewards, mask)
    assert all(torch.equal(a, b) for a, b in zip((rewards, values, mask), copies, strict=True))
    returns = tensor([1.0, 2.0, 4.0, 3.0])
    for kind in ("none", "batch", "prompt", "others"):
        baseline(returns, kind, 2).add(1)
    group_std(returns, 2)
    assert returns.tolist() == [1.0, 2.0, 4.0, 3.0]


def test_a_dialogue_is_its_actions_in_a_row():
    """What lies between two turns of the policy takes no time, whatever stands there."""
    mask = tensor([[False, True, True, False, False, True, False]])
    rewards = tensor([[9.0, 0.0, 1.0, 9.0, math.nan, 4.0, 9.0]])
    values = tensor([[9.0, 1.0, 2.0, 9.0, math.nan, 2.0, 9.0]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    # deltas: 0 + 1 - 1, 1 + 1 - 2, 4 - 2
    assert_close(advantages, tensor([[0.0, 0.125, 0.5, 0.0, 0.0, 2.0, 0.0]]))
    assert_close(returns, tensor([[0.0, 1.125, 2.5, 0.0, 0.0, 4.0, 0.0]]))
    assert_close(reward_to_go(rewards, mask, gamma=0.5), tensor([[0.0, 1.5, 3.0, 0.0, 0.0, 4.0, 0.0]]))
    assert_close(token_rewards(tensor([4.0]), torch.zeros(1, 7), mask)[0], tensor([0.0, 0, 0, 0, 0, 4, 0]))


def test_monte_carlo_by_hand():
    """Two prompts of two answers: whole returns 3 and 1, then 2 and 6; the first action of the last one is masked."""
    rewards = tensor([[1.0, 2.0], [0.0, 1.0], [2.0, 0.0], [9.0, 6.0]])
    mask = tensor([[True, True], [True, True], [True, False], [False, True]])
    reinforce = tensor([[3.0, 2.0], [1.0, 1.0], [2.0, 0.0], [0.0, 6.0]])
    assert_close(monte_carlo(rewards, mask), reinforce)
    rloo = tensor([[2.0, 1.0], [-2.0, -2.0], [-4.0, 0.0], [0.0, 4.0]])
    assert_close(monte_carlo(rewards, mask, kind="others", answers_per_prompt=2), rloo)
    # Means 2 and 4, deviations (divided by K - 1) sqrt(2) and sqrt(8).
    first, second = 2**0.5 + 1e-4, 8**0.5 + 1e-4
    grpo = tensor([[1 / first, 0.0], [-1 / first, -1 / first], [-2 / second, 0.0], [0.0, 2 / second]])
    assert_close(monte_carlo(rewards, mask, kind="prompt", answers_per_prompt=2, divide_by_std=True), grpo)


def test_monte_carlo_discounts():
    mask = torch.ones(1, 3, dtype=torch.bool)
    assert_close(monte_carlo(tensor([[0.0, 0.0, 4.0]]), mask, gamma=0.5), tensor([[1.0, 2.0, 4.0]]))


def test_what_nobody_has_scored_is_in_no_baseline():
    rewards, mask = tensor([[1.0], [3.0], [50.0]]), tensor([[True], [True], [False]])
    settings = {"kind": "prompt", "answers_per_prompt": 3}
    assert_close(monte_carlo(rewards, mask, **settings), tensor([[-1.0], [1.0], [0.0]]))
