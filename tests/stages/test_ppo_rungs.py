"""The ladder: each rung learns, and its advantages and losses are what its equation says."""

import dataclasses
from functools import partial

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from lit_rlhf.functional import importance_weighted_loss, policy_gradient_loss
from lit_rlhf.models import critic_from_policy, critic_on_policy
from lit_rlhf.rollouts import Sampling
from lit_rlhf.stages import PPOModule
from lit_rlhf.stages.ppo import GAE, ClippedLoss, KLPenaltyLoss, MonteCarlo, Scoring
from lit_rlhf.training import adamw

RLOO = {"advantage": MonteCarlo(baseline="others"), "answers_per_prompt": 4}
GRPO = {"advantage": MonteCarlo(baseline="prompt", divide_by_std=True), "answers_per_prompt": 4}
BATCH = {"advantage": MonteCarlo(baseline="batch")}


def likes_e(prompts, responses, **_):
    return [float(response.count("e")) for response in responses]


LIKES_E = Scoring(functions=[likes_e], reward_model_weight=0.0, missing_eos_penalty=0.0)
RUNGS = {
    "REINFORCE": {"advantage": MonteCarlo(), "whiten": False},
    "batch mean": {**BATCH, "whiten": False},
    "prompt mean": {"advantage": MonteCarlo(baseline="prompt"), "answers_per_prompt": 4, "whiten": False},
    "RLOO": {**RLOO, "whiten": False},
    "GRPO": {**GRPO, "whiten": False},
    "TD": {"advantage": GAE(lam=0.0), "critic": critic_from_policy},
    "Monte Carlo": {"advantage": GAE(lam=1.0), "critic": critic_from_policy},
    "GAE": {"critic": critic_from_policy},
    "GAE, shared critic": {"critic": critic_on_policy},
    "policy gradient": {**BATCH, "loss": policy_gradient_loss},
    "importance": {**BATCH, "loss": importance_weighted_loss, "ppo_epochs": 2},
    "KL penalty": {**BATCH, "loss": KLPenaltyLoss(), "ppo_epochs": 2},
    "answer, REINFORCE": {**BATCH, "action": "answer", "loss": policy_gradient_loss},
    "answer, RLOO": {**RLOO, "action": "answer"},
    "answer, critic": {"action": "answer", "critic": critic_from_policy},
}


@pytest.mark.parametrize("rung", RUNGS)
def test_every_rung_learns(rung, ppo, train):
    settings = {"scoring": LIKES_E, "kl_coef": 0.0, "minibatch_size": 16, "sampling": Sampling(3), **RUNGS[rung]}
    module = ppo(optimizer=partial(adamw, lr=2e-2), **settings)
    train(module, iterations=10, batch_size=64 // module.answers_per_prompt)
    scores = module.logged["ppo/score"]
    assert sum(scores[-2:]) / 2 > sum(scores[:2]) / 2 + 0.25


# ------------------------------------------------------------ answers to the same prompt


def test_copies_of_a_prompt_stand_next_to_each_other_and_are_answered_differently(ppo, train):
    module = train(ppo(**RLOO), batch_size=4)
    rollout, batch = module.rollouts[0], module.batches[0]
    assert len(rollout) == 16 and len(batch.tokens) == 4
    for i, sequence in enumerate(rollout.sequences):
        assert sequence[: len(batch.tokens[i // 4])] == batch.tokens[i // 4]
    for group in range(4):
        assert len({tuple(s) for s in rollout.sequences[4 * group : 4 * group + 4]}) == 4


@pytest.mark.parametrize("action", ["token", "answer"])
@pytest.mark.parametrize("rung", ["others", "prompt", "GRPO"])
def test_grouped_advantages_by_hand(rung, action, ppo, train, reward_model):
    divide = rung == "GRPO"
    advantage = MonteCarlo(baseline="prompt" if divide else rung, divide_by_std=divide)
    module = ppo(
        advantage=advantage, answers_per_prompt=4, action=action, whiten=False, kl_coef=0.3,
        scoring=Scoring(missing_eos_penalty=0.5),
    )  # fmt: skip
    rollout = train(module, iterations=2, batch_size=3).rollouts[1]  # of the second the divergence is not 0
    eos = module.tokenizer.eos_token_id
    scores = [reward_model(tensor([s])).logits.item() - 0.5 * (s[-1] != eos) for s in rollout.sequences]
    kl = rollout.old_logprobs - rollout.ref_logprobs
    assert kl.abs().max() > 0.01
    totals = [score - 0.3 * row.sum().item() for score, row in zip(scores, kl)]
    for i in range(12):
        group = totals[i // 4 * 4 : i // 4 * 4 + 4]
        others = [x for j, x in enumerate(group) if j != i % 4]
        compared = others if rung == "others" else group
        scale = tensor(group).std().item() + 1e-4 if divide else 1.0
        n = int(rollout.lengths[i]) if action == "token" else 1
        for t in range(n):  # rewards to go: penalties that were paid before do not count
            to_go = totals[i] + (0.3 * kl[i, :t].sum().item())
            expected = (to_go - sum(compared) / len(compared)) / scale
            assert rollout.advantages[i, t].item() == pytest.approx(expected, abs=2e-4, rel=1e-4)
    assert not rollout.advantages[~rollout.mask].any()
    assert not rollout.values.any() and not rollout.returns.any()
    assert module.critic is None and "ppo/value" not in module.logged


def test_answers_alike_have_no_advantage_in_grpo(ppo, train):
    scoring = Scoring(functions=[lambda p, r, **_: [2.0] * len(r)], reward_model_weight=0.0, missing_eos_penalty=0.0)
    rollout = train(ppo(**GRPO, whiten=False, kl_coef=0.0, scoring=scoring), batch_size=2).rollouts[0]
    assert_close(rollout.advantages, torch.zeros_like(rollout.advantages), atol=1e-3, rtol=0)


# -------------------------------------------------------------- the answer as one action


def test_an_answer_is_one_action(ppo, train, reward_model):
    module = train(ppo(action="answer", kl_coef=0.3, scoring=Scoring(missing_eos_penalty=0.0)), iterations=2)
    rollout = module.rollouts[1]
    for name in ("mask", "old_logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns"):
        assert getattr(rollout, name).shape == (8, 1), name
    assert rollout.mask.all()
    for i, sequence in enumerate(rollout.sequences):
        score = reward_model(tensor([sequence])).logits.item()
        kl = (rollout.old_logprobs[i] - rollout.ref_logprobs[i]).item()
        assert rollout.rewards[i].item() == pytest.approx(score - 0.3 * kl, abs=1e-4)
        assert module.kl_coef == pytest.approx(0.3)
    # One step: the advantage of GAE is reward - value, and the critic's target is the reward.
    assert_close(rollout.returns, rollout.rewards)
    plain = rollout.rewards - rollout.values
    assert_close(rollout.advantages, (plain - plain.mean()) / plain.std(unbiased=False), atol=1e-4, rtol=1e-4)


def test_an_answers_value_is_that_of_its_prompt(ppo, train, reward_model):
    module = train(ppo(action="answer"))
    rollout = module.rollouts[0]
    for i, tokens in enumerate(module.batches[0].tokens):
        hidden = reward_model.model(tensor([tokens])).last_hidden_state[0, -1]
        assert_close(rollout.values[i], reward_model.score(hidden), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("action", ["token", "answer"])
@pytest.mark.parametrize("loss", [ClippedLoss(0.1), policy_gradient_loss, importance_weighted_loss, KLPenaltyLoss(0.7)])
def test_losses_by_plain_transformers(loss, action, ppo, alone, moved, logprobs_of):
    module, batch = alone(ppo(loss=loss, action=action, advantage=MonteCarlo(baseline="batch"), kl_coef=0.5))
    rollout, _ = module.collect(batch)
    moved(module, by=0.02)
    terms = []
    for i, (sequence, n) in enumerate(zip(rollout.sequences, rollout.lengths.tolist())):
        new = logprobs_of(module.policy, sequence, n)
        old, advantages = rollout.old_logprobs[i, :n], rollout.advantages[i, :n]
        if action == "answer":
            new = new.sum()[None]
        ratio = (new - old).exp()
        if loss is policy_gradient_loss:
            terms.append(advantages * new)
        elif loss is importance_weighted_loss:
            terms.append(advantages * ratio)
        elif isinstance(loss, ClippedLoss):
            terms.append(torch.minimum(ratio * advantages, ratio.clamp(0.9, 1.1) * advantages))
        else:
            terms.append(ratio * advantages - 0.7 * (ratio - 1 - ratio.log()))
    expected = -torch.cat(terms).mean()  # over all actions of the minibatch
    policy_loss, value_loss, watched = module.objective.losses(rollout)
    assert_close(policy_loss, expected, atol=1e-4, rtol=1e-4)
    assert value_loss == 0
    assert watched["clip_fraction"] > 0 and watched["approx_kl"] > 0
    parameters = list(module.policy.parameters())
    for a, b in zip(torch.autograd.grad(policy_loss, parameters), torch.autograd.grad(expected, parameters)):
        assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_minibatches_of_all_sizes_cover_a_rollout_once(ppo, alone):
    module, batch = alone(ppo(minibatch_size=3, action="answer"))
    rollout, _ = module.collect(batch)
    parts = list(rollout.shuffled(3, torch.Generator().manual_seed(0)))
    assert [len(part) for part in parts] == [3, 3, 2]
    assert sorted(s for part in parts for s in part.sequences) == sorted(rollout.sequences)
    assert all(part.mask.shape == (len(part), 1) for part in parts)
    one = dataclasses.replace(rollout).select(tensor([5]))
    assert one.sequences == [rollout.sequences[5]] and one.rewards.item() == rollout.rewards[5].item()


# ------------------------------------------------------------------------ the KL-penalty loss


def test_beta_follows_how_far_the_policy_moved(ppo, train):
    module = train(ppo(loss=KLPenaltyLoss(beta=0.5, target=1e-3), ppo_epochs=2), iterations=4)
    moves, betas = module.logged["ppo/approx_kl"], module.logged["ppo/beta"]
    expected = [0.5]
    for kl in moves:
        factor = 0.5 if kl < 1e-3 / 1.5 else 2.0 if kl > 1e-3 * 1.5 else 1.0
        expected.append(expected[-1] * factor)
    assert betas == pytest.approx(expected[:-1])
    assert module.loss.beta.item() == pytest.approx(expected[-1])
    assert len(set(betas)) > 1
    assert module.state_dict()["loss.beta"].item() == pytest.approx(expected[-1])


def test_beta_without_a_target_stays(ppo, train):
    assert train(ppo(loss=KLPenaltyLoss(beta=0.5, target=None)), iterations=2).logged["ppo/beta"] == [0.5, 0.5]


def test_whole_numbers_as_coefficients_adapt_too(ppo):
    """`beta: 1` in a file is an int: as a buffer of ints it could never be a half."""
    loss = KLPenaltyLoss(beta=1)
    loss.adapt(0.0)
    assert loss.beta == 0.5
    module = ppo(kl_coef=1, kind=PPOModule)
    assert module.kl_coef.is_floating_point()


@pytest.mark.parametrize("critic", [critic_from_policy, critic_on_policy])
def test_shared_prompts_change_nothing_that_is_learned(critic, ppo, alone, moved):
    found = []
    for share in (False, True):
        module = moved(ppo(critic=critic, answers_per_prompt=4, minibatch_size=16, share_prompts=share))
        module, batch = alone(module)
        rollout, _ = module.collect(batch)
        cells = module.batching.packed(rollout.sequences, rollout.response_mask).tokens.numel()
        policy_loss, value_loss, _ = module.objective.losses(rollout)
        (policy_loss + value_loss).backward()
        gradients = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
        found.append((cells, rollout, gradients))
    (cells, apart, one), (fewer, shared, other) = found
    assert fewer < 0.8 * cells and shared.sequences == apart.sequences
    for name in ("old_logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns"):
        assert_close(getattr(shared, name), getattr(apart, name), rtol=0, atol=2e-5)
    assert one.keys() == other.keys()
    for name in one:
        assert_close(other[name], one[name], rtol=1e-3, atol=1e-5)
