"""A minibatch of PPO in parts: the gradients of the whole, whatever the loss is made of."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

from lit_rlhf.models import LoRA, critic_from_policy, critic_from_reward_model, critic_on_policy
from lit_rlhf.models.micro_batches import tokens_at_once
from lit_rlhf.stages import WorldPretrainDataModule
from lit_rlhf.stages.ppo import KLPenalty, MonteCarlo

KINDS = {
    "plain": {},
    "full KL in the loss": {"kl": KLPenalty(estimator="full", in_loss=True), "kl_coef": 0.3},
    "k3 in the loss, one action an answer": {"kl": KLPenalty(estimator="k3", in_loss=True), "action": "answer"},
    "critic on the policy": {"critic": critic_on_policy},
    "no critic, shared prompts": {"advantage": MonteCarlo(baseline="others"), "answers_per_prompt": 4},
    "a temperature": {"sampling_temperature": 0.7},
}


def gradients(module, rollout, size):
    """Of the loss of a minibatch, by parameter, in parts of ``size`` answers."""
    module.micro_batch_size = size
    module.zero_grad()
    for part, share in module.objective.micro_batches(rollout):
        policy_loss, value_loss, _ = module.objective.losses(part)
        ((policy_loss + module.value_coef * value_loss) * share).backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_add_up_to_the_minibatchs_in_float64(
    kind, norms_in_float64, policy, reward_model, ppo, alone, moved, short
):
    settings = dict(KINDS[kind])
    if temperature := settings.pop("sampling_temperature", None):
        settings["sampling"] = type(short)(max_new_tokens=6, temperature=temperature)
    module, batch = alone(ppo(policy.double(), reward_model.double(), minibatch_size=8, **settings))
    rollout, _ = module.collect(batch)
    rollout.mask[4] = False  # nobody has scored it: parts have unequal numbers of actions
    moved(module)
    whole = gradients(module, rollout, None)
    assert len(module.objective.micro_batches(rollout)) == 1
    parts = gradients(module, rollout, 3)
    assert len(module.objective.micro_batches(rollout)) == -(-len(rollout) // 3)
    assert whole.keys() == parts.keys()
    for name, expected in whole.items():
        near = 1e-9 if module.critic is None else 1e-6  # values are float32 whatever the model is
        assert_close(parts[name], expected, rtol=0, atol=near * expected.abs().max().item())


def test_what_the_models_say_does_not_depend_on_how_many_are_read_at_once(ppo, alone):
    found = []
    for size in (None, 3, 1):
        module, batch = alone(ppo(kl=KLPenalty(estimator="full"), minibatch_size=8, micro_batch_size=size))
        found.append(module.collect(batch)[0])
    for other in found[1:]:
        assert other.sequences == found[0].sequences
        for name in ("mask", "old_logprobs", "ref_logprobs", "values", "rewards", "advantages", "returns"):
            assert_close(getattr(other, name), getattr(found[0], name), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("ptx", [False, True])
def test_training_in_parts_is_training(ptx, ppo, train, world):
    text = partial(WorldPretrainDataModule, world, documents=200, block_size=24, held_out=0.1)
    settings = {"minibatch_size": 8, "ppo_epochs": 2, "optimizer": partial(torch.optim.SGD, lr=0.1)}
    settings |= {"ptx": text, "ptx_coef": 0.5} if ptx else {}
    whole, parts = (train(ppo(**settings, micro_batch_size=size), batch_size=16) for size in (None, 3))
    assert len(whole.updates) == len(parts.updates) == 4
    assert parts.off[0] < 1e-4  # the first step's ratio is 1
    for ours, theirs in zip(parts.updates, whole.updates):
        assert ours.keys() == theirs.keys()
        for name in theirs:
            assert ours[name].item() == pytest.approx(theirs[name].item(), rel=1e-3, abs=1e-5), name
    for ours, theirs in zip(parts.parameters(), whole.parameters()):
        assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_gradients_do_not_stay_for_the_next_rollout(ppo, train):
    assert all(p.grad is None for p in train(ppo()).parameters())


@pytest.mark.parametrize("make", [critic_from_reward_model, critic_from_policy])
def test_large_models_are_given_less(make, ppo, monkeypatch):
    module = ppo(critic=make)
    # Of 32 in width and 64 in the MLP: attention 4 x 64 numbers, MLP 3 x 96, two layers of each of policy and critic.
    kept = 4 * (4 * 64 + 3 * 96) * 2 * 2
    assert tokens_at_once(module, learning=True) == 2**29 // kept
    assert tokens_at_once(module, learning=False) == 2**28 // (kept // 4)
    frozen = ppo(critic=partial(make, lora=LoRA(r=2)))
    assert tokens_at_once(frozen, learning=True) < tokens_at_once(module, learning=True)


def test_a_minibatch_is_cut_where_its_tokens_are_too_many(ppo, alone, monkeypatch):
    module, batch = alone(ppo(minibatch_size=8))
    rollout, _ = module.collect(batch)
    monkeypatch.setattr("lit_rlhf.stages.ppo.learning.tokens_at_once", lambda module, learning: 40)
    parts = [part for part, _ in module.objective.micro_batches(rollout)]
    assert [s for part in parts for s in part.sequences] == rollout.sequences
    assert len(parts) > 1 and all(sum(map(len, part.sequences)) <= 40 or len(part) == 1 for part in parts)


def test_answers_to_one_prompt_share_it_in_one_part(ppo, alone, monkeypatch):
    module, batch = alone(ppo(advantage=MonteCarlo(baseline="others"), answers_per_prompt=4))
    rollout, _ = module.collect(batch)
    shuffled = rollout.select(torch.randperm(len(rollout), generator=torch.Generator().manual_seed(1)))
    prompts = [tuple(s[: mask.index(True)]) for s, mask in zip(shuffled.sequences, shuffled.response_mask)]
    widest = max(len(p) + sum(len(s) - len(p) for s, q in zip(shuffled.sequences, prompts) if q == p) for p in prompts)
    monkeypatch.setattr("lit_rlhf.stages.ppo.learning.tokens_at_once", lambda module, learning: widest)
    parts = [part for part, _ in module.objective.micro_batches(shuffled)]
    assert sorted(s for part in parts for s in part.sequences) == sorted(shuffled.sequences)
    for part in parts:
        packed = module.batching.packed(part.sequences, part.response_mask)
        assert packed.tokens.numel() <= widest
    apart = [{tuple(s[: m.index(True)]) for s, m in zip(p.sequences, p.response_mask)} for p in parts]
    assert 1 < len(parts) < len(shuffled)
    # A part ends within the answers to a prompt at the most once.
    assert sum(map(len, apart)) <= len(set(prompts)) + len(parts) - 1
