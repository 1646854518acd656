"""The divergence from the reference: measured, paid for, held at a target; and a reference that follows."""

import copy
import dataclasses
from functools import partial

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from lit_rlhf.errors import UserError
from lit_rlhf.rollouts import Sampling
from lit_rlhf.stages.ppo import KLPenalty, MonteCarlo, ReferenceUpdate, Scoring
from lit_rlhf.training import adamw

PLAIN = {  # rewards are the penalty alone, and advantages take nothing away from it
    "advantage": MonteCarlo(), "whiten": False,
    "scoring": Scoring(functions=[lambda p, r, **_: [0.0] * len(r)], reward_model_weight=0.0, missing_eos_penalty=0.0),
}  # fmt: skip


def divergence(estimator, policy, reference, sequence, n, temperature=1.0):
    """(n,) by plain transformers, with gradients to the policy."""
    tokens = tensor([sequence])

    def logprobs(model):
        return (model(input_ids=tokens).logits[0, -n - 1 : -1] / temperature).log_softmax(-1)

    ours, theirs = logprobs(policy), logprobs(reference).detach()
    if estimator == "full":
        return (ours.exp() * (ours - theirs)).sum(-1)
    d = (ours - theirs).gather(1, tokens[0, -n:, None])[:, 0]
    return {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d}[estimator]


def divergences(estimator, module, rollout):
    return [
        divergence(estimator, module.policy, module.reference.start, s, n, module.sampling.temperature)
        for s, n in zip(rollout.sequences, rollout.lengths.tolist())
    ]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "full"])
def test_penalties_by_plain_transformers(estimator, temperature, family, reward_model_of, ppo, alone, moved):
    sampling = Sampling(8, temperature=temperature)
    settings = {**PLAIN, "kl": KLPenalty(estimator=estimator), "kl_coef": 0.3, "sampling": sampling}
    module, batch = alone(moved(ppo(family, reward_model_of(family), **settings)))
    rollout, _ = module.collect(batch)
    for row, expected in zip(rollout.rewards, divergences(estimator, module, rollout)):
        assert_close(row[: len(expected)], -0.3 * expected, atol=1e-4, rtol=1e-4)
        assert not row[len(expected) :].any()
        assert expected.abs().max() > 1e-3


def test_penalties_of_a_whole_answer_are_summed(ppo, alone, moved):
    module, batch = alone(moved(ppo(**PLAIN, kl=KLPenalty(estimator="full"), kl_coef=0.3, action="answer")))
    rollout, _ = module.collect(batch)
    expected = torch.stack([-0.3 * kl.sum() for kl in divergences("full", module, rollout)])
    assert_close(rollout.rewards[:, 0], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("estimator", ["k2", "k3", "full"])
def test_the_gradient_of_a_penalty_in_the_loss(estimator, family, reward_model_of, ppo, alone, moved):
    settings = {**PLAIN, "kl": KLPenalty(estimator=estimator, in_loss=True), "kl_coef": 0.3}
    module, batch = alone(moved(ppo(family, reward_model_of(family), **settings)))
    rollout, _ = module.collect(batch)
    assert not rollout.rewards.any()  # nothing is taken from them then
    expected = 0.3 * torch.cat(divergences(estimator, module, rollout)).mean()
    loss, _, watched = module.objective.losses(rollout)
    assert_close(loss, expected, atol=1e-5, rtol=1e-4)
    assert_close(watched["kl_loss"], expected.detach() / 0.3, atol=1e-5, rtol=1e-4)
    assert watched["policy_loss"] == 0
    parameters = list(module.policy.parameters())
    gradients = torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters)
    for a, b in zip(*gradients):
        assert_close(a, b, atol=1e-5, rtol=1e-3)
    assert max(g.abs().max() for g in gradients[0]) > 1e-3


@pytest.mark.parametrize("estimator", ["k2", "full"])
def test_a_penalty_in_the_loss_of_a_whole_answer(estimator, ppo, alone, moved):
    kl = KLPenalty(estimator=estimator, in_loss=True)
    module, batch = alone(moved(ppo(**PLAIN, kl=kl, kl_coef=0.3, action="answer"), by=0.01))
    rollout, _ = module.collect(batch)
    if estimator == "full":
        expected = torch.stack([kl.sum() for kl in divergences("full", module, rollout)]).mean()
    else:  # half the square of the answer's own log-ratio
        expected = torch.stack([kl.sum() ** 2 / 2 for kl in divergences("k1", module, rollout)]).mean()
    assert_close(module.objective.losses(rollout)[0], 0.3 * expected, atol=1e-5, rtol=1e-4)


def test_a_penalty_in_the_loss_holds_the_policy_back(ppo, train):
    scoring = Scoring(functions=[lambda p, r, **_: [float(len(x)) for x in r]], reward_model_weight=0.0)
    moved_by = {}
    for coef in (0.0, 30.0):
        kl = KLPenalty(estimator="k2", in_loss=True)
        settings = {"kl": kl, "kl_coef": coef, "advantage": MonteCarlo(baseline="batch"), "minibatch_size": 8}
        modules = [ppo(scoring=scoring, seed=seed, **settings) for seed in range(3)]  # one alone may draw luckily
        moved_by[coef] = sum(train(m, iterations=6, batch_size=32).logged["ppo/kl"][-1] for m in modules)
    assert moved_by[30.0] < 0.5 * moved_by[0.0]


# ------------------------------------------------------------------------- adaptive


def test_the_coefficient_goes_to_where_the_divergence_is_at_its_target(ppo, train):
    kl = KLPenalty(adaptive=True, target=0.05, horizon=40.0)
    module = train(ppo(kl=kl, kl_coef=0.1), iterations=4)
    coefs, expected = module.logged["ppo/kl_coef"], [0.1]
    for nats in module.logged["ppo/kl"]:  # an answer
        error = min(max(nats / 0.05 - 1, -0.2), 0.2)
        expected.append(expected[-1] * (1 + error * 8 / 40))
    assert coefs == pytest.approx(expected[:-1])
    assert min(coefs) < 0.1 < coefs[-1]  # first down, where policy and reference are the same, then up
    assert module.state_dict()["kl_coef"].item() == pytest.approx(expected[-1])
    checkpoint = torch.load(f"{module.trainer.default_root_dir}/run/last.ckpt", weights_only=True)
    assert checkpoint["state_dict"]["kl_coef"].item() == pytest.approx(expected[-1])


def test_a_fixed_coefficient_stays(ppo, train):
    assert train(ppo(kl=KLPenalty(target=0.05), kl_coef=0.1), iterations=2).kl_coef == pytest.approx(0.1)


def test_each_rollout_pays_its_own_coefficient(ppo, train):
    kl = KLPenalty(adaptive=True, target=0.05, horizon=8.0)
    module = train(ppo(**PLAIN, kl=kl, kl_coef=1.0), iterations=3)
    for rollout, coef in zip(module.rollouts, module.logged["ppo/kl_coef"]):
        assert_close(rollout.rewards, -coef * (rollout.old_logprobs - rollout.ref_logprobs))


# ------------------------------------------------------------------------------ stop


def test_updates_end_where_the_policy_has_moved_too_far(ppo, train):
    endless = train(ppo(ppo_epochs=3), iterations=2)
    assert len(endless.updates) == 2 * 3 * 2
    stopped = train(ppo(ppo_epochs=3, kl=KLPenalty(stop=1e-6)), iterations=2)
    # The first update of a rollout sees no divergence; the second one does, and is the last.
    assert len(stopped.updates) == 2 * 2
    assert stopped.lr_schedulers().last_epoch == 4
    kls = [u["approx_kl"].item() for u in stopped.updates]
    assert kls[0] < 1e-6 < kls[1] and kls[2] < 1e-6 < kls[3]
    assert (int(stopped.iteration), int(stopped.progress.episodes)) == (2, 16)
    assert len(train(ppo(ppo_epochs=3, kl=KLPenalty(stop=100.0)), iterations=2).updates) == 12


# ---------------------------------------------------------------------------- budget


FREE = {"kl_coef": 0.0, "optimizer": partial(adamw, lr=3e-3)}  # nothing holds the policy


def test_training_ends_with_the_rollout_that_has_used_up_its_budget(ppo, train, capsys):
    """Validated as after a last iteration: what is exported is what was measured."""
    endless = train(ppo(**FREE), iterations=6)
    kls = endless.logged["ppo/kl"]
    budget = max(kls[:4])  # reached by the fourth rollout at the latest
    last = next(i for i, kl in enumerate(kls) if kl >= budget)
    capsys.readouterr()
    ended = train(ppo(**FREE, kl=KLPenalty(budget=budget - 1e-6)), iterations=6)
    assert int(ended.iteration) == last + 1 and "val/ppo/kl" in ended.trainer.callback_metrics
    assert f"ppo.kl.budget is {budget - 1e-6:g}: training ends here" in capsys.readouterr().out
    assert int(train(ppo(**FREE, kl=KLPenalty(budget=1e3)), iterations=6).iteration) == 6


# ------------------------------------------------------------------- moving reference


def test_a_reference_that_averages_the_policy(policy, ppo, train, logprobs_of):
    module = train(ppo(**PLAIN, reference=ReferenceUpdate(ema=0.8), kl_coef=0.5), iterations=3)
    start = dict(policy.named_parameters())
    average = {name: p.detach().clone() for name, p in start.items()}
    for after in module.policies:
        average = {name: 0.8 * p + 0.2 * after[name] for name, p in average.items()}
    for name, p in module.reference.moving.named_parameters():
        assert_close(p, average[name])
        assert not p.requires_grad
    for name, p in module.reference.start.named_parameters():
        assert torch.equal(p, start[name])
    # The next rollout pays for its distance from there.
    rollout, _ = module.collect(module.batches[0])
    for i, (sequence, n) in enumerate(zip(rollout.sequences, rollout.lengths.tolist())):
        expected = logprobs_of(module.reference.moving, sequence, n)
        assert_close(rollout.ref_logprobs[i, :n], expected, atol=1e-5, rtol=1e-5)


def test_a_reference_that_is_refreshed(ppo, train):
    module = train(ppo(reference=ReferenceUpdate(refresh_every=2), kl_coef=0.5), iterations=5)
    for name, p in module.reference.moving.named_parameters():
        assert torch.equal(p, module.policies[3][name])  # as it was after four iterations
    kls = module.logged["ppo/kl"]
    assert abs(kls[0]) < 1e-4 and abs(kls[2]) < 1e-4 and abs(kls[4]) < 1e-4
    assert abs(kls[1]) > 1e-3 and abs(kls[3]) > 1e-3


def test_a_moving_reference_is_in_the_checkpoint_and_the_first_one_is_not(ppo, train):
    for reference, kept in ((ReferenceUpdate(ema=0.8), True), (ReferenceUpdate(), False)):
        module = train(ppo(reference=reference))
        names = {name.split(".")[1] for name in module.state_dict() if name.startswith("reference.")}
        assert names == ({"moving"} if kept else set())


def test_validation_is_against_the_sft_model_though_the_reference_moved(ppo, prompts, fit):
    module, data = ppo(reference=ReferenceUpdate(refresh_every=1), val_samples=2), prompts()
    fit(module, data, max_epochs=1, limit_train_batches=3)
    module.trainer.validate(module, datamodule=data, verbose=False)
    assert abs(module.figures()["kl"]) > 0.01  # the reference that moves is the policy by now


# ------------------------------------------------------------------- half precision


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_reference_and_a_reward_model_in_half_precision(dtype, family, reward_model_of, ppo, alone):
    half = getattr(torch, dtype)
    sampling = Sampling(8)
    reward_model = reward_model_of(family)
    full, batch = alone(ppo(copy.deepcopy(family), copy.deepcopy(reward_model), sampling=sampling))
    small, _ = alone(
        ppo(family, reward_model.to(half), sampling=sampling, reference=ReferenceUpdate(dtype=dtype)),
    )
    assert {p.dtype for p in small.reference.parameters()} == {half}
    assert {p.dtype for p in small.scorer.reward_model.parameters()} == {half}
    assert {p.dtype for p in (*small.policy.parameters(), *small.critic.parameters())} == {torch.float32}
    expected, found = full.collect(batch)[0], small.collect(batch)[0]
    assert found.sequences == expected.sequences and torch.equal(found.old_logprobs, expected.old_logprobs)
    assert found.ref_logprobs.dtype == found.rewards.dtype == torch.float32
    difference = (found.ref_logprobs - expected.ref_logprobs).abs()
    assert 0 < difference.max() < 0.2 and difference[found.mask].mean() < 0.03  # nats per token
    assert_close(found.rewards.sum(-1), expected.rewards.sum(-1), atol=0.15, rtol=0.05)


def test_ppo_with_a_small_reference_learns_and_keeps_it_out_of_the_checkpoint(policy, reward_model, ppo, train):
    before = [p.clone() for p in policy.parameters()]
    module = train(ppo(reward_model=reward_model.to(torch.bfloat16), reference=ReferenceUpdate(dtype="bfloat16")))
    assert any((a != b).any() for a, b in zip(before, module.policy.parameters()))
    assert all(value < 0.1 for value in map(abs, module.logged["ppo/kl"][:1]))  # nats: rounding alone
    assert not any(name.startswith(("reference.", "scorer.reward_model")) for name in module.state_dict())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: KLPenalty(in_loss=True), r"estimator='k1' with in_loss=True \(ppo.kl\): the gradient of k1 is 0"),
        (lambda: KLPenalty(adaptive=True), r"adaptive=True \(ppo.kl\) needs target, in nats per answer"),
        (lambda: ReferenceUpdate(ema=0.9, refresh_every=3), "exclude each other; give one of them"),
    ],
)
def test_settings_that_cannot_be(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_settings_are_fixed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        KLPenalty().stop = 1.0
