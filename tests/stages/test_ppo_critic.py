"""The critic: where it begins, what it learns from, and what it leaves alone."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from lit_rlhf.errors import UserError
from lit_rlhf.models import LoRA, critic_from_policy, critic_from_reward_model, critic_on_policy
from lit_rlhf.models.adapters import lora_layers
from lit_rlhf.models.reward_head import RewardEnsemble
from lit_rlhf.stages.ppo import GAE, KLPenalty, MonteCarlo, Scoring
from lit_rlhf.stages.ppo.scoring import Scorer, critic_in_units
from lit_rlhf.text import pack

FUNCTION = Scoring(functions=[lambda p, r, **_: [float(len(x)) for x in r]], reward_model_weight=0.0)


def parameters_of(model):
    return [p.detach().clone() for p in model.parameters()]


def alike(model, kept):
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), kept, strict=True))


def test_a_critic_from_the_policy_begins_at_0(ppo, train):
    module = train(ppo(critic=critic_from_policy), iterations=2)
    assert not module.rollouts[0].values.any()
    assert module.rollouts[1].values.any()


def test_a_shared_critic_adds_no_backbone(policy, ppo, train):
    module = train(ppo(critic=critic_on_policy), iterations=2)
    assert [name for name, _ in module.critic.named_parameters()] == ["head.weight"]
    assert not module.rollouts[0].values.any() and module.rollouts[1].values.any()
    assert not any(name.startswith("critic.backbone") for name in module.state_dict())
    groups = module.optimizers().param_groups
    held = {id(p): group["initial_lr"] for group in groups for p in group["params"]}
    assert held[id(module.critic.head.weight)] == 1e-3  # critic_lr
    assert len(held) == len(list(module.policy.parameters())) + 1


@pytest.mark.parametrize("critic", [critic_on_policy, critic_from_policy, critic_from_reward_model])
def test_what_the_value_loss_reaches(critic, ppo, alone):
    module, batch = alone(ppo(critic=critic))
    torch.nn.init.normal_(module.critic.head.weight, std=0.1)  # at 0 it passes nothing on
    rollout, _ = module.collect(batch)
    _, value_loss, _ = module.objective.losses(rollout)
    value_loss.backward()
    shared = critic is critic_on_policy
    reached = [n for n, p in module.policy.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert len(reached) == (len(list(module.policy.parameters())) if shared else 0)
    for name, parameter in module.critic.named_parameters():
        assert parameter.grad is not None, name


@pytest.mark.parametrize("value_clip_range", [None, 0.05])
@pytest.mark.parametrize("critic", [critic_on_policy, critic_from_reward_model])
def test_the_value_loss_by_plain_transformers(critic, value_clip_range, ppo, alone):
    module, batch = alone(ppo(critic=critic, value_clip_range=value_clip_range))
    torch.nn.init.normal_(module.critic.head.weight, std=0.1)
    rollout, _ = module.collect(batch)
    with torch.no_grad():
        module.critic.head.weight.add_(0.02 * torch.randn_like(module.critic.head.weight))
    backbone = module.policy.model if module.critic.backbone is None else module.critic.backbone
    errors, clipped = [], 0
    for i, (sequence, n) in enumerate(zip(rollout.sequences, rollout.lengths.tolist())):
        hidden = backbone(input_ids=tensor([sequence])).last_hidden_state[0, -n - 1 : -1]
        values, old, target = hidden @ module.critic.head.weight[0], rollout.values[i, :n], rollout.returns[i, :n]
        error = (values - target) ** 2
        if value_clip_range is not None:
            near = old + (values - old).clamp(-value_clip_range, value_clip_range)
            clipped += int((near != values).sum())
            error = torch.maximum(error, (near - target) ** 2)
        errors.append(error)
    assert_close(module.objective.losses(rollout)[1], 0.5 * torch.cat(errors).mean(), atol=1e-5, rtol=1e-4)
    assert value_clip_range is None or clipped > 0


@pytest.mark.parametrize("critic", [critic_on_policy, critic_from_policy, critic_from_reward_model])
def test_warmup_leaves_the_policy_alone(critic, policy, ppo, train):
    kept, iterations = parameters_of(policy), []
    module = ppo(critic=critic, critic_warmup=2, probe_rollouts=1)
    heads = [module.critic.head.weight.detach().clone()]
    step = module.training_step

    def watched(batch, batch_idx):
        step(batch, batch_idx)
        iterations.append(alike(module.policy, kept))
        heads.append(module.critic.head.weight.detach().clone())

    module.training_step = watched
    train(module, iterations=3)
    assert iterations == [True, True, False]
    assert all((a != b).any() for a, b in pairwise(heads))
    assert module.logged["ppo/grad_norm"][:2] == [0, 0] and module.logged["ppo/grad_norm"][2] > 0
    assert len(module.logged["ppo/gradient_noise"]) == 1  # before the policy's first step, which comes later


def test_no_warmup_without_a_critic(policy, ppo, train):
    module = train(ppo(advantage=MonteCarlo(baseline="batch"), critic_warmup=5))
    assert not alike(module.policy, parameters_of(policy))


def test_the_two_learning_rates(ppo, train):
    module = train(ppo(critic_lr=5e-3))
    held = {id(p): group["initial_lr"] for group in module.optimizers().param_groups for p in group["params"]}
    assert {held[id(p)] for p in module.policy.parameters()} == {1e-2}
    assert {held[id(p)] for p in module.critic.parameters()} == {5e-3}
    assert len(held) == len(list(module.policy.parameters())) + len(list(module.critic.parameters()))


def test_gradients_are_clipped_each_for_itself(policy, reward_model, ppo, train):
    sgd = partial(torch.optim.SGD, lr=1.0)
    module = train(ppo(optimizer=sgd, critic_lr=1.0, max_grad_norm=1e-3, minibatch_size=8))  # one step
    for model, start in ((module.policy, policy), (module.critic, critic_from_reward_model(policy, reward_model))):
        step = sum((a - b).square().sum() for a, b in zip(model.parameters(), start.parameters())).sqrt()
        assert step.item() == pytest.approx(1e-3, rel=1e-2)


def test_a_critic_learns_which_prompts_score_well(ppo, train):
    fond = Scoring(
        functions=[lambda prompts, r, **_: [float(len(p[-1]["content"]) > 24) for p in prompts]],
        reward_model_weight=0.0, missing_eos_penalty=0.0,
    )  # fmt: skip
    settings = {"critic": critic_from_policy, "critic_warmup": 100, "critic_lr": 1e-2, "ppo_epochs": 2}
    module = ppo(advantage=GAE(lam=1.0), value_clip_range=None, minibatch_size=8, scoring=fond, **settings)
    train(module, iterations=6, batch_size=16)
    losses, explained = module.logged["ppo/value_loss"], module.logged["ppo/explained_variance"]
    assert losses[-1] < 0.7 * losses[0]
    assert explained[0] == pytest.approx(0, abs=1e-5) and explained[-1] > 0.25


@pytest.mark.parametrize("critic", [critic_from_policy, critic_on_policy])
def test_no_reward_model_is_needed(critic, ppo, train):
    module = train(ppo(reward_model=None, critic=critic, scoring=FUNCTION))
    assert len(module.logged["ppo/score"]) == 1


def test_a_critic_from_a_reward_model_that_is_not_there(ppo):
    with pytest.raises(UserError, match=r"critic=critic_from_reward_model .*needs a reward model, and there is none"):
        ppo(reward_model=None, scoring=FUNCTION)
    ppo(reward_model=None, scoring=FUNCTION, advantage=MonteCarlo())  # which asks for no critic


@pytest.mark.parametrize("make", [critic_from_policy, critic_from_reward_model])
def test_a_critic_with_adapters(make, policy, reward_model, ppo, train):
    module = ppo(critic=partial(make, lora=LoRA(r=2)))
    kept = {name: p.detach().clone() for name, p in module.critic.named_parameters()}
    train(module, iterations=2)
    changed = {name for name, p in module.critic.named_parameters() if (p != kept[name]).any()}
    assert lora_layers(module.critic)
    assert changed == {name for name in kept if "lora_" in name or name == "head.weight"}


def test_a_critic_on_the_policy_values_the_states_that_answers_were_drawn_from(ppo, alone, moved):
    """Without another pass over them, which half precision and the full divergence need, and which says the same."""
    found = []
    for kl in (KLPenalty(), KLPenalty(estimator="full")):
        module, batch = alone(moved(ppo(critic=critic_on_policy, kl=kl)))
        torch.manual_seed(2)
        torch.nn.init.normal_(module.critic.head.weight)
        assert module.collector._reads_policy == (kl.estimator == "full")
        found.append(module.collect(batch)[0])
    kept, read = found
    assert kept.sequences == read.sequences and kept.values.std() > 0.1
    assert_close(kept.values, read.values, rtol=1e-4, atol=1e-4)
    assert not kept.values[~kept.mask].any()


@pytest.mark.parametrize("scale, center", [("reference", False), ("reference", True), ("none", False)])
@pytest.mark.parametrize("members", [1, 2])
def test_a_critic_that_begins_as_the_reward_model_predicts_what_is_learned_from(
    reward_model, policy, scale, center, members
):
    torch.nn.init.normal_(reward_model.score.weight, std=0.5)
    reward_model.config.update({"score_shift": 0.5, "score_std": 4.0, "score_mean": 1.0})
    given = reward_model if members == 1 else RewardEnsemble([reward_model] * 2)
    scoring = Scoring(scale=scale, center=center, reward_model_weight=2.0)
    critic = critic_in_units(critic_from_reward_model, policy, given, scoring)
    packed = pack([[5, 6, 7], [8, 9, 10, 11, 12]], 0)
    values = critic(packed, packed.ends, None)
    assert_close(values, Scorer(given, scoring).raw([packed], [[]] * 2, [""] * 2, {}))  # of whole answers: their scores
    raw = reward_model(input_ids=tensor([[5, 6, 7]])).logits[0, 0]
    scaled = (raw + 0.5 - float(center)) / 4 if scale == "reference" else (raw + 0.5) / 4 ** (members - 1)
    assert_close(values[0], 2 * scaled, atol=1e-5, rtol=1e-5)
