"""Tensors that belong together and differ in shape are named, in plain and in compiled code without a break."""

import pytest
import torch

from lit_rlhf import functional as F

ONES, SHORT, MASK = torch.ones(4, 5), torch.ones(4, 3), torch.ones(4, 5, dtype=torch.bool)
PAIRS = F.ranking_pairs(torch.tensor([1, 2]), torch.tensor([0, 0]))


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
        (
            lambda: F.token_logprobs(torch.ones(2, 3, 7), torch.ones(3, 2).long()),
            r"targets \(3, 2\) and logits .*\(2, 3\)",
        ),
        (lambda: F.token_rewards(torch.ones(5), ONES, MASK), r"scores \(5,\) and rows of penalties \(4,\)"),
        (lambda: F.best_of_n(SHORT, SHORT[:, :2]), r"grades \(4, 3\) and scores \(4, 2\)"),
        (lambda: F.expected_best_of_n(SHORT, SHORT[:, :2], 2), r"worth \(4, 3\) and scores \(4, 2\)"),
        (lambda: F.expected_best_of_n(SHORT, SHORT, 4), "n=4 of 3 answers"),
        (lambda: F.win_rate(SHORT, SHORT[:1]), r"ours \(4, 3\) and theirs \(1, 3\)"),
        (lambda: F.feedback_loss(torch.ones(3, 1), torch.ones(3)), r"scores \(3, 1\) and ratings \(3,\)"),
        (lambda: F.ranking_loss(torch.ones(2), PAIRS, margins=torch.ones(3)), r"margins \(3,\) and gaps \(1,\)"),
        (lambda: F.calibration(torch.ones(3), torch.ones(2)), r"probabilities \(3,\) and outcomes \(2,\)"),
        (lambda: F.correlation(torch.ones(3), torch.ones(2), torch.ones(3)), r"x \(3,\) and y \(2,\)"),
        (lambda: F.ranking_pairs(torch.ones(3), torch.ones(2)), r"ranks \(3,\) and prompt_index \(2,\)"),
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
