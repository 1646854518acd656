import math

import pytest
import torch
from hypothesis import given, strategies as st
from torch import tensor
from torch.testing import assert_close

from lit_rlhf.functional.preference import (
    calibration,
    correlation,
    dpo_loss,
    feedback_loss,
    implicit_rewards,
    pair_accuracy,
    ranking_loss,
    ranking_pairs,
)

# Four prompts, interleaved: 7 has 4 answers, 2 has 3 with a tie, 5 has 2, 9 is tied throughout.
PROMPTS = [7, 2, 7, 5, 2, 7, 9, 5, 7, 9, 2]
RANKS = [1, 1, 3, 2, 2, 4, 1, 1, 2, 1, 1]
SCORES = [0.3, -1.0, 0.8, 0.1, 0.4, -0.6, 2.0, 1.5, 0.2, -3.0, 0.9]


def reference(scores, ranks, prompts):
    """Loss and gradient by loops, from eq. 1 of InstructGPT, ties left out."""
    losses, gradients = [], []
    for prompt in sorted(set(prompts)):
        mine = [i for i, p in enumerate(prompts) if p == prompt]
        pairs = [(w, v) for w in mine for v in mine if ranks[w] < ranks[v]]
        if not pairs:
            continue
        gradient, loss = [0.0] * len(scores), 0.0
        for w, v in pairs:
            right = 1 / (1 + math.exp(scores[v] - scores[w]))  # sigma(r_w - r_l)
            loss -= math.log(right) / len(pairs)
            gradient[w] -= (1 - right) / len(pairs)
            gradient[v] += (1 - right) / len(pairs)
        losses.append(loss)
        gradients.append(gradient)
    return sum(losses) / len(losses), [sum(g) / len(losses) for g in zip(*gradients, strict=True)]


def test_a_ranking_of_k_gives_all_pairs():
    pairs = ranking_pairs(tensor([2, 1, 4, 3]), tensor([0, 0, 0, 0]))
    found = set(zip(pairs.better.tolist(), pairs.worse.tolist(), strict=True))
    assert found == {(1, 0), (1, 3), (1, 2), (0, 3), (0, 2), (3, 2)} and len(pairs.better) == 6  # rank 1 is best
    assert_close(pairs.weight, torch.full((6,), 1 / 6))
    assert pairs.prompts == 1


def test_pairs_stay_inside_a_prompt_and_leave_ties_out():
    pairs = ranking_pairs(tensor([1, 2, 2, 1, 1]), tensor([3, 3, 3, 8, 8]))
    assert sorted(zip(pairs.better.tolist(), pairs.worse.tolist(), strict=True)) == [(0, 1), (0, 2)]
    assert_close(pairs.weight, tensor([0.5, 0.5]))
    assert pairs.prompts == 1  # the second prompt is tied


def test_ranking_loss_by_hand():  # sigma(ln 3) = 3/4
    pairs = ranking_pairs(tensor([1, 2]), tensor([0, 0]))
    assert_close(ranking_loss(tensor([math.log(3), 0.0]), pairs), tensor(-math.log(0.75)))
    assert_close(ranking_loss(tensor([0.0, math.log(3)]), pairs), tensor(-math.log(0.25)))


def test_a_prompt_counts_once_however_many_answers_it_has():
    # Prompt 0: one pair, -ln(3/4). Prompt 1: six pairs of equal scores, ln 2 each.
    pairs = ranking_pairs(tensor([1, 2, 1, 2, 3, 4]), tensor([0, 0, 1, 1, 1, 1]))
    scores = tensor([math.log(3), 0.0, 5.0, 5.0, 5.0, 5.0])
    assert_close(ranking_loss(scores, pairs), tensor((math.log(2) - math.log(0.75)) / 2))


def test_ranking_loss_and_gradient_are_the_mean_over_the_pairs_by_loops():
    scores = tensor(SCORES, dtype=torch.float64, requires_grad=True)
    loss = ranking_loss(scores, ranking_pairs(tensor(RANKS), tensor(PROMPTS)))
    loss.backward()
    expected, gradient = reference(SCORES, RANKS, PROMPTS)
    assert_close(loss.item(), expected, rtol=0, atol=1e-7)  # the weights are float32
    assert_close(scores.grad, tensor(gradient, dtype=torch.float64), rtol=0, atol=1e-7)
    assert_close(ranking_loss(tensor(SCORES), ranking_pairs(tensor(RANKS), tensor(PROMPTS))).item(), expected)


def test_ranking_loss_gradcheck():
    pairs = ranking_pairs(tensor(RANKS), tensor(PROMPTS))
    assert torch.autograd.gradcheck(
        lambda s: ranking_loss(s, pairs), tensor(SCORES, dtype=torch.float64, requires_grad=True)
    )


def test_ranking_loss_knows_neither_order_nor_offset():
    ranks, prompts, scores = tensor(RANKS), tensor(PROMPTS), tensor(SCORES)
    loss = ranking_loss(scores, ranking_pairs(ranks, prompts))
    order = torch.randperm(len(RANKS), generator=torch.Generator().manual_seed(0))
    assert_close(ranking_loss(scores[order], ranking_pairs(ranks[order], prompts[order])), loss)
    assert_close(ranking_loss(scores + 10.0 * prompts, ranking_pairs(ranks, prompts)), loss, rtol=1e-4, atol=0)


def test_ties_everywhere_give_zero_loss_and_gradient():
    scores = tensor([1.0, -2.0, 3.0], requires_grad=True)
    loss = ranking_loss(scores, ranking_pairs(tensor([1, 1, 1]), tensor([0, 0, 1])))
    loss.backward()
    assert loss.item() == 0 and scores.grad.tolist() == [0.0, 0.0, 0.0]


def test_large_margins_stay_finite():
    pairs = ranking_pairs(tensor([1, 2]), tensor([0, 0]))
    scores = tensor([-200.0, 200.0], requires_grad=True)
    loss = ranking_loss(scores, pairs)
    loss.backward()
    assert_close(loss.detach(), tensor(400.0))
    assert_close(scores.grad, tensor([-1.0, 1.0]))


def test_pair_accuracy_by_hand():
    pairs = ranking_pairs(tensor([1, 2, 2, 3]), tensor([0, 0, 0, 0]))  # (0,1) (0,2) (0,3) (1,3) (2,3)
    assert_close(pair_accuracy(tensor([2.0, 1.0, 3.0, 1.0]), pairs), tensor(3.5 / 5))  # right, wrong, right, tie, right
    assert_close(pair_accuracy(tensor([4.0, 3.0, 2.0, 1.0]), pairs), tensor(1.0))
    assert_close(pair_accuracy(tensor([1.0, 2.0, 2.0, 3.0]), pairs), tensor(0.0))
    assert_close(pair_accuracy(torch.zeros(4), pairs), tensor(0.5))


def test_pair_accuracy_without_a_pair_is_nan():
    assert pair_accuracy(tensor([1.0, 2.0]), ranking_pairs(tensor([1, 1]), tensor([0, 0]))).isnan()


rankings = st.lists(  # (prompt, rank, score) of an answer
    st.tuples(st.integers(0, 3), st.integers(1, 4), st.floats(-20, 20, allow_subnormal=False)), min_size=1, max_size=10
)


@given(rankings, st.randoms(use_true_random=False))
def test_pairs_and_accuracy_against_loops_in_any_order(answers, random):
    random.shuffle(answers)
    prompts, ranks, scores = zip(*answers)
    pairs = ranking_pairs(tensor(ranks), tensor(prompts))
    n = range(len(answers))
    expected = {(i, j) for i in n for j in n if prompts[i] == prompts[j] and ranks[i] < ranks[j]}
    found = list(zip(pairs.better.tolist(), pairs.worse.tolist()))
    assert len(found) == len(expected) and set(found) == expected
    assert pairs.prompts == len({prompts[i] for i, _ in expected})
    for prompt in {prompts[i] for i, _ in expected}:  # each counts once
        weights = pairs.weight[[prompts[i] == prompt for i, _ in found]]
        assert_close(weights, torch.full_like(weights, 1 / len(weights)))
    if expected:
        right = sum((scores[i] > scores[j]) + (scores[i] == scores[j]) / 2 for i, j in expected)
        accuracy = pair_accuracy(tensor(scores, dtype=torch.float64), pairs)
        assert_close(accuracy.item(), right / len(expected), rtol=1e-6, atol=1e-6)
    loss = ranking_loss(tensor(scores, dtype=torch.float64), pairs).item()
    assert_close(loss, reference(scores, ranks, prompts)[0] if expected else 0.0, rtol=0, atol=1e-5)


@given(rankings, st.integers(1, 3), st.integers(0, 9))
def test_only_the_order_of_ranks_and_the_sameness_of_prompts_count(answers, factor, offset):
    prompts, ranks, scores = map(tensor, zip(*answers))
    loss = ranking_loss(scores, ranking_pairs(ranks, prompts))
    assert_close(ranking_loss(scores, ranking_pairs(factor * ranks**3 - offset, offset - prompts)), loss)


def test_prompts_may_be_split_into_micro_batches():
    ranks, prompts, scores = tensor(RANKS), tensor(PROMPTS), tensor(SCORES)
    total, count = 0.0, 0
    for part in (prompts == 7, (prompts == 2) | (prompts == 9), prompts == 5):
        pairs = ranking_pairs(ranks[part], prompts[part])
        total, count = total + ranking_loss(scores[part], pairs) * pairs.prompts, count + pairs.prompts
    assert_close(total / count, ranking_loss(scores, ranking_pairs(ranks, prompts)))


def test_implicit_rewards_by_hand():
    logprobs, reference = tensor([-1.0, -4.0, -2.0]), tensor([-3.0, -3.0, -2.0])
    assert_close(implicit_rewards(logprobs, reference, beta=0.5), tensor([1.0, -0.5, 0.0]))


def test_dpo_loss_by_hand():
    # log pi/ref is 2 - ln 3 for the better answer and 2 - 3 ln 3 for the other: beta times 2 ln 3, sigma(ln 3) = 3/4
    pairs = ranking_pairs(tensor([2, 1]), tensor([0, 0]))
    reference = tensor([-9.0, -5.0], dtype=torch.float64)
    logprobs = reference + 2 - tensor([3.0, 1.0], dtype=torch.float64) * math.log(3)
    logprobs.requires_grad_()
    loss = dpo_loss(logprobs, reference, pairs, beta=0.5)
    loss.backward()
    assert_close(loss.item(), -math.log(0.75))
    # eq. 7's gradient: -beta sigma(-margin) for the better one
    assert_close(logprobs.grad, tensor([0.125, -0.125], dtype=torch.float64))


def test_dpo_starts_at_ln_2_and_turned_round_is_its_mirror():
    pairs, scores = ranking_pairs(tensor(RANKS), tensor(PROMPTS)), tensor(SCORES)
    assert_close(dpo_loss(scores, scores, pairs, beta=0.1), tensor(math.log(2)))
    reference = scores.flip(0)
    mirrored = ranking_pairs(-tensor(RANKS), tensor(PROMPTS))
    assert_close(dpo_loss(scores, reference, pairs, 0.3), dpo_loss(reference, scores, mirrored, 0.3))


@given(rankings, st.floats(0.01, 2), st.randoms(use_true_random=False))
def test_dpo_loss_is_the_ranking_loss_of_implicit_rewards(answers, beta, random):
    prompts, ranks, logprobs = zip(*answers)
    reference_logprobs = [random.uniform(-20, 20) for _ in answers]
    rewards = [beta * (a - b) for a, b in zip(logprobs, reference_logprobs)]
    pairs = ranking_pairs(tensor(ranks), tensor(prompts))
    x, ref = (tensor(x, dtype=torch.float64) for x in (logprobs, reference_logprobs))
    expected = reference(rewards, ranks, prompts)[0] if len(pairs.better) else 0.0
    assert_close(dpo_loss(x, ref, pairs, beta).item(), expected, rtol=1e-6, atol=1e-6)
    # what both policies share, and a constant of the prompt, cancel
    assert_close(dpo_loss(x + ref + 5 * tensor(prompts), 2 * ref, pairs, beta), dpo_loss(x, ref, pairs, beta))


def test_dpo_loss_gradcheck():
    pairs, ref = ranking_pairs(tensor(RANKS), tensor(PROMPTS)), tensor(SCORES, dtype=torch.float64).flip(0)
    x = tensor(SCORES, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: dpo_loss(x, ref, pairs, beta=0.3), x)


def test_margin_grows_with_the_rank_distance_by_hand():
    # ranks 1, 2, 4: distances 1, 3 and 2; with scores 3 a, 2 a, 0 each gap less the margin a is distance * 0 = 0
    pairs = ranking_pairs(tensor([1, 2, 4]), tensor([0, 0, 0]))
    assert sorted(zip(pairs.better.tolist(), pairs.worse.tolist(), pairs.distance.tolist())) == [
        (0, 1, 1), (0, 2, 3), (1, 2, 2),
    ]  # fmt: skip
    scores = tensor([3.0, 2.0, 0.0]) * 0.7
    assert_close(ranking_loss(scores, pairs, margin=0.7), tensor(math.log(2)))
    pair = ranking_pairs(tensor([1, 3]), tensor([0, 0]))  # sigma(ln 3) = 3/4
    assert_close(ranking_loss(tensor([math.log(3) + 1.0, 0.0]), pair, margin=0.5), tensor(-math.log(0.75)))


def test_label_smoothing_by_hand():
    pairs = ranking_pairs(tensor([1, 2]), tensor([0, 0]))
    loss = ranking_loss(tensor([math.log(3), 0.0]), pairs, label_smoothing=0.1)
    assert_close(loss, tensor(-0.9 * math.log(0.75) - 0.1 * math.log(0.25)))
    # least where sigma(gap) is 1 - 0.1: the gradient is sigma(gap) - 0.9
    gap = torch.tensor([math.log(9), 0.0], dtype=torch.float64, requires_grad=True)
    ranking_loss(gap, pairs, label_smoothing=0.1).backward()
    assert_close(gap.grad, torch.zeros(2, dtype=torch.float64), atol=1e-7, rtol=0)


def test_feedback_loss_by_hand():
    scores, ratings = tensor([math.log(3), math.log(3), 0.5, 9.0]), tensor([1.0, 0.0, 0.75, math.nan])
    soft = -0.75 * math.log(1 / (1 + math.exp(-0.5))) - 0.25 * math.log(1 / (1 + math.exp(0.5)))
    assert_close(feedback_loss(scores, ratings), tensor((-math.log(0.75) - math.log(0.25) + soft) / 3))
    squared = ((math.log(3) - 1) ** 2 + (math.log(3) + 1) ** 2 + 0.0) / 3  # 0.75 of the way from -1 to 1 is 0.5
    assert_close(feedback_loss(scores, ratings, "squared"), tensor(squared))


def test_feedback_loss_leaves_answers_without_a_rating_alone():
    scores = tensor([1.0, 2.0], requires_grad=True)
    loss = feedback_loss(scores, tensor([math.nan, math.nan]))
    loss.backward()
    assert loss.item() == 0 and scores.grad.tolist() == [0.0, 0.0]


def test_calibration_by_hand():
    # bins of 0.25: {0.1, 0.2}, {}, {0.6}, {0.8, 0.9, 1.0}
    probabilities, outcomes = tensor([0.1, 0.6, 0.8, 0.2, 1.0, 0.9]), tensor([0.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    found = calibration(probabilities, outcomes, bins=4)
    assert_close(found.predicted, torch.tensor([0.15, 0.6, 0.9], dtype=torch.float64), atol=1e-6, rtol=0)
    assert_close(found.observed, torch.tensor([0.5, 1.0, 2 / 3], dtype=torch.float64))
    assert found.counts.tolist() == [2, 1, 3]
    assert_close(found.error.item(), (2 * 0.35 + 0.4 + 3 * (0.9 - 2 / 3)) / 6, atol=1e-6, rtol=0)
    folded = calibration(tensor([0.5, 0.7, 0.8]), tensor([0.5, 1.0, 1.0]), bins=2, low=0.5)  # {0.5, 0.7}, {0.8}
    assert folded.counts.tolist() == [2, 1]
    assert_close(folded.error.item(), (2 * 0.15 + 0.2) / 3, atol=1e-6, rtol=0)


def test_what_comes_true_as_often_as_it_was_said_is_calibrated():
    generator = torch.Generator().manual_seed(0)
    said = torch.rand(100_000, generator=generator)
    came = (torch.rand(100_000, generator=generator) < said).float()
    assert calibration(said, came).error < 0.01
    assert_close(calibration(said**0.5, came).error.item(), 1 / 6, atol=0.01, rtol=0)  # E[sqrt u - u] = 2/3 - 1/2


def test_calibration_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no prediction"):
        calibration(torch.zeros(0), torch.zeros(0))


def test_correlation_inside_groups():
    # inside each prompt y = 2 x + c, though prompts with larger x have smaller y
    x, group = tensor([1.0, 2.0, 3.0, 11.0, 12.0]), tensor([0, 0, 0, 1, 1])
    y = 2 * x - 50 * group
    assert_close(correlation(x, y, group).item(), 1.0)
    assert_close(correlation(x, -y, group).item(), -1.0)
    # deviations (-1, 0, 1) and (1, -2, 1): orthogonal
    assert_close(correlation(tensor([1, 2, 3]), tensor([4, 1, 4]), tensor([5, 5, 5])).item(), 0.0)
    assert correlation(x, torch.ones(5), group).isnan()


def test_a_margin_of_each_pair_by_hand():  # arXiv:2307.09288, eq. 2: -log sigma(r_w - r_l - m)
    pairs = ranking_pairs(tensor([1, 2, 1, 2]), tensor([0, 0, 1, 1]))
    scores = tensor([math.log(3) + 2, 0.0, 1.0, 1.0])
    # The first pair differs by ln 3 + 2 and is to differ by 2: sigma(ln 3) = 3/4. The second by 0, with no margin.
    assert_close(ranking_loss(scores, pairs, margins=tensor([2.0, 0.0])), tensor((-math.log(0.75) + math.log(2)) / 2))
    # Beside a margin for each rank: 1 and 2 are a rank apart.
    both = ranking_loss(scores, pairs, margin=1.0, margins=tensor([1.0, -1.0]))
    assert_close(both, tensor((-math.log(0.75) + math.log(2)) / 2))
