import math

import pytest
import torch
from hypothesis import given, strategies as st
from torch import tensor
from torch.testing import assert_close

from lit_rlhf.functional.kl import adapted_kl_coef, full_kl, kl_estimate, sequence_kl

INF, LN2 = float("inf"), math.log(2)
LOGITS = tensor([0.3, -1.0, 0.8], dtype=torch.float64)
REF_LOGITS = tensor([-0.5, 0.2, 0.1], dtype=torch.float64)

rows = st.integers(2, 5).flatmap(  # logits of two distributions over the same tokens
    lambda v: st.tuples(*[st.lists(st.floats(-6, 6, allow_subnormal=False), min_size=v, max_size=v)] * 2)
)


def softmax(row):
    total = sum(math.exp(x) for x in row)
    return [math.exp(x) / total for x in row]


def kl(p, q):  # by loops
    return sum(a * math.log(a / b) for a, b in zip(p, q) if a)


def gradient(f):
    logits = LOGITS.clone().requires_grad_()
    f(logits).backward()
    return logits.grad


@pytest.mark.parametrize("hidden", [float("nan"), float("-inf"), 50.0])
def test_sequence_kl_by_hand_is_a_sum_over_response_tokens(hidden):
    logprobs = tensor([[hidden, -1.0, -2.0, -0.5], [-1.0, -3.0, hidden, hidden]])
    reference = tensor([[hidden, -1.5, -4.0, -0.25], [-0.5, -1.0, 0.0, hidden]])
    mask = tensor([[False, True, True, True], [True, True, False, False]])
    # 0.5 + 2 - 0.25, and -0.5 - 2: one answer may well be below 0
    assert_close(sequence_kl(logprobs, reference, mask), tensor([2.25, -2.5]))


def test_sequence_kl_of_the_reference_itself_is_zero():
    logprobs = -torch.rand(3, 5)
    assert torch.equal(sequence_kl(logprobs, logprobs, torch.ones(3, 5, dtype=torch.bool)), torch.zeros(3))


def test_expectation_over_the_policy_is_the_kl_divergence():
    # Two tokens of three words each, all nine answers weighed by their probability: KL adds up over the tokens.
    policy, reference = [[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]], [[0.2, 0.2, 0.6], [0.3, 0.3, 0.4]]
    exact = sum(
        p * math.log(p / q) for ps, qs in zip(policy, reference, strict=True) for p, q in zip(ps, qs, strict=True)
    )
    answers = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    logprobs, ref_logprobs = (
        torch.stack([tensor(x[t], dtype=torch.float64)[answers[:, t]] for t in range(2)], dim=1).log()
        for x in (policy, reference)
    )
    kl = sequence_kl(logprobs, ref_logprobs, torch.ones(9, 2, dtype=torch.bool))
    assert_close((logprobs.sum(1).exp() * kl).sum().item(), exact)
    assert_close(sequence_kl(logprobs.float(), ref_logprobs.float(), torch.ones(9, 2, dtype=torch.bool)), kl.float())


def test_gradient_reaches_response_tokens_only():
    logprobs = tensor([[-1.0, float("nan")]], requires_grad=True)
    sequence_kl(logprobs, tensor([[-2.0, -2.0]]), tensor([[True, False]])).sum().backward()
    assert_close(logprobs.grad, tensor([[1.0, 0.0]]))


@pytest.mark.parametrize(
    ("estimator", "above", "below"),  # the policy twice as sure of the token as the reference, and half as sure
    [("k1", LN2, -LN2), ("k2", LN2**2 / 2, LN2**2 / 2), ("k3", LN2 - 0.5, 1 - LN2)],
)
def test_kl_estimates_by_hand(estimator, above, below):
    logprobs, reference = tensor([[0.5, 0.2], [0.25, 0.3]]).log(), tensor([[0.25, 0.2], [0.5, 0.3]]).log()
    assert_close(kl_estimate(logprobs, reference, estimator), tensor([[above, 0.0], [below, 0.0]]))


def test_k1_is_the_default():
    assert_close(kl_estimate(tensor([-1.0]), tensor([-3.0])), tensor([2.0]))


def test_k3_of_a_small_step_survives_rounding():
    estimate = kl_estimate(tensor([1e-3, -1e-3]), tensor([0.0, 0.0]), "k3")
    assert_close(
        estimate, tensor([4.9983e-7, 5.0017e-7]), rtol=2e-3, atol=0
    )  # d^2/2 - d^3/6; 1.2e-7 is float32's grain


@given(rows)
def test_estimates_average_to_the_divergence(logits):
    p, q = map(softmax, logits)
    log_p, log_q = (tensor(x, dtype=torch.float64).log() for x in (p, q))
    weights = tensor(p, dtype=torch.float64)
    for estimator in ("k1", "k3"):
        assert_close((weights * kl_estimate(log_p, log_q, estimator)).sum().item(), kl(p, q), rtol=0, atol=1e-9)
    assert (kl_estimate(log_p, log_q, "k3") >= 0).all() and (kl_estimate(log_p, log_q, "k2") >= 0).all()
    squares = sum(a * math.log(a / b) ** 2 / 2 for a, b in zip(p, q))  # biased: it is what it says
    assert_close((weights * kl_estimate(log_p, log_q, "k2")).sum().item(), squares, rtol=0, atol=1e-9)


def forward(logits):  # KL(pi || ref), and its gradient by autograd from this line
    return (logits.softmax(-1) * (logits.log_softmax(-1) - REF_LOGITS.log_softmax(-1))).sum()


def backward(logits):  # KL(ref || pi)
    return (REF_LOGITS.softmax(-1) * (REF_LOGITS.log_softmax(-1) - logits.log_softmax(-1))).sum()


def half_square(logits):  # E[d^2 / 2]
    return (logits.softmax(-1) * (logits.log_softmax(-1) - REF_LOGITS.log_softmax(-1)) ** 2 / 2).sum()


@pytest.mark.parametrize(("estimator", "expected"), [("k1", lambda x: 0 * x.sum()), ("k2", forward), ("k3", backward)])
def test_expected_gradient_as_a_loss(estimator, expected):
    """All tokens weighed by their probability, which the derivative does not see."""
    weights, reference = LOGITS.softmax(-1), REF_LOGITS.log_softmax(-1)
    found = gradient(lambda x: (weights * kl_estimate(x.log_softmax(-1), reference, estimator)).sum())
    assert_close(found, gradient(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("k1", forward),
        ("k2", lambda x: half_square(x) - forward(x)),
        ("k3", lambda x: forward(x) - backward(x)),
    ],
)
def test_expected_gradient_as_a_reward(estimator, expected):
    """``E[k grad log pi]``, which sees the samples change and not the estimate: of the three, k1 alone is a penalty
    whose policy gradient is that of the divergence."""
    weights, reference = LOGITS.softmax(-1), REF_LOGITS.log_softmax(-1)
    penalty = kl_estimate(LOGITS.log_softmax(-1), reference, estimator)
    found = gradient(lambda x: (weights * penalty * x.log_softmax(-1)).sum())
    assert_close(found, gradient(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_estimates_gradcheck(estimator):
    logprobs = tensor([-0.5, -2.0, -1.0], dtype=torch.float64, requires_grad=True)
    reference = tensor([-1.5, -1.0, -1.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: kl_estimate(x, reference, estimator), logprobs)


def test_full_kl_by_hand():
    logits = tensor([[[0.5, 0.5], [0.25, 0.75]], [[0.5, 0.5], [1.0, 1e-30]]]).log()
    ref_logits = tensor([[[0.25, 0.75], [0.5, 0.5]], [[0.5, 0.5], [0.5, 0.5]]]).log() + 3.0  # a constant adds nothing
    # ln(4/3) / 2, which is not what the other direction gives: ln(1/2) / 4 + 3/4 ln(3/2)
    other = -LN2 / 4 + 0.75 * math.log(1.5)
    assert_close(full_kl(logits, ref_logits), tensor([[math.log(4 / 3) / 2, other], [0.0, LN2]]))


def test_full_kl_of_tokens_that_are_ruled_out():
    logits = tensor([[0.0, 0.0, -INF], [0.0, 0.0, -INF], [0.0, 0.0, 0.0], [0.0, -INF, -INF]], requires_grad=True)
    ref_logits = tensor([[0.0, 0.0, -INF], [0.0, 0.0, 0.0], [0.0, 0.0, -INF], [0.0, -INF, -INF]])
    kl = full_kl(logits, ref_logits)
    # by both; by the policy alone, 2 tokens of 3; by the reference alone, which no policy may leave; all but one
    assert_close(kl.detach(), tensor([0.0, math.log(1.5), INF, 0.0]))
    kl[[0, 1, 3]].sum().backward()
    # At the second row pi = (1/2, 1/2, 0) and log pi/ref is the same for both tokens: nothing to gain by moving.
    assert_close(logits.grad[[0, 1, 3]], torch.zeros(3, 3))


@given(rows)
def test_full_kl_against_loops(logits):
    a, b = (tensor([x], dtype=torch.float64) for x in logits)
    assert_close(full_kl(a, b), tensor([kl(*map(softmax, logits))], dtype=torch.float64), rtol=0, atol=1e-9)
    assert_close(full_kl(a.float(), b.float()).double(), full_kl(a, b), rtol=1e-4, atol=1e-5)
    assert full_kl(a, b).item() >= -1e-12 and abs(full_kl(a, a).item()) < 1e-12


@given(rows, st.randoms(use_true_random=False))
def test_full_kl_knows_neither_the_order_of_tokens_nor_an_offset(logits, random):
    a, b = (tensor(x, dtype=torch.float64) for x in logits)
    order = random.sample(range(len(a)), len(a))
    assert_close(full_kl(a[order] + 7, b[order] - 3), full_kl(a, b), rtol=0, atol=1e-9)


def test_full_kl_gradcheck():
    logits = torch.stack([LOGITS, REF_LOGITS * 2]).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: full_kl(x, torch.stack([REF_LOGITS, LOGITS])), logits)
    assert_close(gradient(lambda x: full_kl(x, REF_LOGITS)), gradient(forward))


@pytest.mark.parametrize(
    ("kl", "episodes", "expected"),  # coefficient 0.1, target 6 nats, horizon 1000 episodes
    [
        (6.0, 100, 0.1),
        (6.6, 100, 0.101),  # a tenth too far, 100 episodes of 1000
        (5.4, 100, 0.099),
        (60.0, 100, 0.102),  # clipped to a fifth
        (-1.0, 100, 0.098),  # an estimate may be below 0
        (60.0, 500, 0.11),
        (60.0, 1000, 0.12),
    ],
)
def test_adapted_kl_coef_by_hand(kl, episodes, expected):
    assert_close(adapted_kl_coef(0.1, kl, target=6.0, episodes=episodes, horizon=1000.0), expected)


@given(st.floats(0.1, 10), st.floats(0, 50), st.floats(0, 50), st.integers(1, 500))
def test_the_coefficient_grows_with_the_divergence_and_scales_with_itself(coef, kl, more, episodes):
    low, high = (adapted_kl_coef(coef, x, 6.0, episodes, 1000.0) for x in (kl, kl + more))
    assert low <= high
    assert 0.9 * coef - 1e-9 <= low and high <= 1.1 * coef + 1e-9  # half a horizon at most
    assert_close(adapted_kl_coef(2 * coef, kl, 6.0, episodes, 1000.0), 2 * low)


@pytest.mark.parametrize(("target", "horizon"), [(0.0, 10.0), (-1.0, 10.0), (6.0, 0.0), (6.0, -1.0), (math.nan, 10.0)])
def test_adapted_kl_coef_refuses_a_target_or_horizon_of_zero(target, horizon):
    with pytest.raises(ValueError, match="must be above 0"):
        adapted_kl_coef(0.1, 1.0, target, 10, horizon)


def test_the_coefficient_moves_until_the_divergence_is_at_the_target():
    coef = 0.01  # of a policy that ends 3 / coef nats away
    for _ in range(3000):
        coef = adapted_kl_coef(coef, kl=3 / coef, target=6.0, episodes=64, horizon=1000.0)
    assert_close(coef, 0.5)


@given(st.integers(1, 3), st.integers(0, 2), st.integers(0, 2), st.integers(0, 99))
def test_neither_the_order_of_answers_nor_padding_matters(answers, left, right, seed):
    generator = torch.Generator().manual_seed(seed)
    logprobs, reference = torch.randn(2, answers, 4, generator=generator, dtype=torch.float64)
    mask = torch.rand(answers, 4, generator=generator) < 0.5
    order = torch.randperm(answers, generator=generator)
    moved = [
        torch.nn.functional.pad(x[order], (left, right), value=v)
        for x, v in ((logprobs, math.nan), (reference, -INF), (mask, False))
    ]
    assert_close(sequence_kl(*moved), sequence_kl(logprobs, reference, mask)[order])
