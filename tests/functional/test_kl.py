import math

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from lit_rlhf.functional.kl import sequence_kl


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
