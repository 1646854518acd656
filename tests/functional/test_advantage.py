import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from lit_rlhf.functional.advantage import gae, token_rewards

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


def test_token_rewards_by_hand_with_padding_on_either_side():
    logprobs = tensor([[-1.0, -2.0, NAN, NAN], [NAN, NAN, -1.0, -2.0], [NAN, -3.0, NAN, NAN]])
    reference = tensor([[-2.0, -1.0, NAN, 5.0], [NAN, 5.0, -3.0, -2.5], [NAN, -3.0, NAN, NAN]])
    mask = tensor([[True, True, False, False], [False, False, True, True], [False, True, False, False]])
    rewards = token_rewards(tensor([10.0, -4.0, 7.0]), logprobs, reference, mask, kl_coef=0.5)
    # -0.5 (log pi - log ref), plus the score on the last real token
    expected = tensor([[-0.5, 10.5, 0.0, 0.0], [0.0, 0.0, -1.0, -4.25], [0.0, 7.0, 0.0, 0.0]])
    assert_close(rewards, expected)


def test_the_score_reaches_exactly_the_last_real_token():
    _, logprobs, mask = ragged()
    scores = tensor([1.0, 2.0, 3.0, 4.0])
    rewards = token_rewards(scores, logprobs, logprobs, mask, kl_coef=0.3)  # policy == reference: no penalty
    expected = torch.zeros_like(logprobs)
    for row, last in enumerate([3, 5, 1, 5]):
        expected[row, last] = scores[row]
    assert_close(rewards, expected)


def test_rewards_add_up_to_the_score_less_the_penalty():  # InstructGPT, eq. 2
    reference, logprobs, mask = ragged(hidden=NAN)
    rewards = token_rewards(tensor([1.0, 2.0, 3.0, 4.0]), logprobs, reference, mask, kl_coef=0.3)
    for row in range(4):
        kl = sum((logprobs[row, t] - reference[row, t]).item() for t in range(6) if mask[row, t])
        assert_close(rewards[row].sum().item(), row + 1 - 0.3 * kl)


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


def test_gae_leaves_its_inputs_alone():
    rewards, values, mask = ragged(hidden=3.0)
    copies = rewards.clone(), values.clone(), mask.clone()
    gae(rewards, values, mask, gamma=0.9, lam=0.8)
    token_rewards(torch.ones(4, dtype=torch.float64), rewards, values, mask, kl_coef=0.1)
    assert all(torch.equal(a, b) for a, b in zip((rewards, values, mask), copies, strict=True))
