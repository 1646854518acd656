"""Tensors that belong together and differ in shape are named, in plain and in compiled code without a break."""

import pytest
import torch

from lit_rlhf import functional as F

ONES, SHORT, MASK = torch.ones(4, 5), torch.ones(4, 3), torch.ones(4, 5, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: F.gae(SHORT, SHORT, MASK, 1.0, 0.9), r"rewards \(4, 3\) and mask \(4, 5\) differ in shape"),
        (lambda: F.gae(ONES, SHORT, MASK, 1.0, 0.9), r"rewards \(4, 5\) and values \(4, 3\)"),
        (lambda: F.reward_to_go(SHORT, MASK), r"rewards \(4, 3\) and mask"),
        (lambda: F.token_rewards(torch.ones(4), SHORT, MASK), r"penalties \(4, 3\) and mask"),
        (lambda: F.whiten(ONES[:, :1], MASK), r"values \(4, 1\) and mask"),  # it would be broadcast in silence
        (lambda: F.clipped_policy_loss(ONES, ONES, ONES[:1], MASK, 0.2), r"logprobs \(4, 5\) and advantages \(1, 5\)"),
        (lambda: F.clipped_value_loss(ONES, ONES, ONES[:, :1], MASK, 0.2), r"values \(4, 5\) and returns \(4, 1\)"),
        (lambda: F.kl_estimate(ONES, ONES[:1]), r"logprobs \(4, 5\) and ref_logprobs \(1, 5\)"),
        (lambda: F.masked_mean(ONES, MASK[:, :1]), r"values \(4, 5\) and mask \(4, 1\)"),
        (lambda: F.implicit_rewards(ONES, SHORT, 0.1), r"logprobs \(4, 5\) and ref_logprobs \(4, 3\)"),
    ],
)
def test_shapes_that_differ_are_named(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def test_a_choice_that_is_none_is_named():
    for call in (
        lambda: F.baseline(torch.ones(4), "rloo", 2),
        lambda: F.kl_estimate(ONES, ONES, "k4"),
        lambda: F.feedback_loss(torch.ones(4), torch.ones(4), "l2"),
    ):
        with pytest.raises(ValueError, match=r"(kind='rloo'|estimator='k4'|form='l2'): '.*' or '.*' was expected"):
            call()


def test_compiled_code_has_no_check():
    compiled = torch.compile(F.clipped_policy_loss, backend="eager", fullgraph=True)
    assert torch.equal(compiled(ONES, ONES, ONES, MASK, 0.2), F.clipped_policy_loss(ONES, ONES, ONES, MASK, 0.2))
    compiled(ONES, ONES, ONES[:1], MASK, 0.2)  # broadcast, as plain torch does
