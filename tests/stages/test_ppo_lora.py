"""PPO and the reward stage with adapters."""

import copy
from functools import partial

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lit_rlhf.errors import UserError
from lit_rlhf.models import LoRA, add_lora, critic_from_policy, critic_on_policy
from lit_rlhf.models.adapters import lora_layers
from lit_rlhf.stages import RewardDataModule, RewardModule
from lit_rlhf.stages.ppo import KLPenalty, MonteCarlo, ReferenceUpdate
from lit_rlhf.text.records import write_jsonl

R4 = LoRA(r=4)


@pytest.fixture
def adapted(family):
    """(a policy as it was, the same with adapters)"""
    return copy.deepcopy(family), add_lora(family, R4)


def test_there_is_no_second_policy_in_memory(adapted, reward_model_of, ppo):
    module = ppo(adapted[1], reward_model_of(adapted[0]), advantage=MonteCarlo())
    assert not list(module.reference.parameters())
    with module.reference.as_it_began(module.policy) as reference:
        assert reference is module.policy


def test_only_adapters_change_and_what_is_exported_is_plain(adapted, reward_model_of, ppo, train, tmp_path, tokenizer):
    plain, policy = adapted
    module = train(ppo(policy, reward_model_of(plain)), iterations=2)
    kept = dict(policy.named_parameters())
    changed = {name for name, p in module.policy.named_parameters() if (p != kept[name]).any()}
    assert changed == {name for name in kept if "lora_" in name}
    module.export(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.state_dict().keys() == plain.state_dict().keys()
    tokens = torch.tensor([tokenizer("What colour is the mog?")["input_ids"]])
    expected = module.policy(tokens).logits
    assert_close(loaded(tokens).logits, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template


def test_the_reference_is_the_model_without_adapters(adapted, reward_model_of, ppo, alone, moved, logprobs_of):
    plain, policy = adapted
    module, batch = alone(moved(ppo(policy, reward_model_of(plain), advantage=MonteCarlo())))
    rollout, _ = module.collect(batch)
    for i, (sequence, n) in enumerate(zip(rollout.sequences, rollout.lengths.tolist())):
        assert_close(rollout.ref_logprobs[i, :n], logprobs_of(plain.eval(), sequence, n), atol=1e-4, rtol=1e-4)
    assert (rollout.old_logprobs - rollout.ref_logprobs).abs().max() > 0.01


@pytest.mark.parametrize("estimator", ["k2", "full"])
def test_a_penalty_in_the_loss_reaches_the_adapters(estimator, policy, reward_model, ppo, alone, moved):
    plain, kl = copy.deepcopy(policy).eval(), KLPenalty(estimator=estimator, in_loss=True)
    module = moved(ppo(add_lora(policy, R4), reward_model, advantage=MonteCarlo(baseline="batch"), kl=kl))
    module, batch = alone(module)
    rollout, _ = module.collect(batch)
    rollout.advantages.zero_()
    module.objective.losses(rollout)[0].backward()
    gradients = {name: p.grad.clone() for name, p in module.policy.named_parameters() if p.requires_grad}
    module.policy.zero_grad()
    terms = []
    for sequence, n in zip(rollout.sequences, rollout.lengths.tolist()):
        tokens = torch.tensor([sequence])
        ours, theirs = (m(tokens).logits[0, -n - 1 : -1].log_softmax(-1) for m in (module.policy, plain))
        d = (ours - theirs).gather(1, tokens[0, -n:, None])[:, 0]
        terms.append(d**2 / 2 if estimator == "k2" else (ours.exp() * (ours - theirs)).sum(-1))
    (0.1 * torch.cat(terms).mean()).backward()
    for name, gradient in gradients.items():
        assert_close(gradient, module.policy.get_parameter(name).grad, atol=1e-5, rtol=1e-3)
    assert max(g.abs().max() for g in gradients.values()) > 1e-4


def test_validation_answers_by_policy_and_sft_model(policy, reward_model, ppo, prompts, fit, moved):
    module, data = ppo(add_lora(policy, R4), reward_model, val_samples=2), prompts()
    trainer = fit(module, data, max_epochs=1, limit_train_batches=2)
    moved(module)
    trainer.validate(module, datamodule=data, verbose=False)
    assert abs(module.figures()["kl"]) > 0.01
    assert [p for n, p in module.policy.named_parameters() if p.requires_grad and "lora_" not in n] == []


@pytest.mark.parametrize("critic", [partial(critic_from_policy, lora=R4), critic_on_policy])
def test_other_critics(critic, policy, reward_model, ppo, train):
    module = train(ppo(add_lora(policy, R4), reward_model, critic=critic), iterations=2)
    assert module.off[0] < 1e-5
    assert module.rollouts[1].values.any()
    learned = {id(p) for group in module.optimizers().param_groups for p in group["params"]}
    models = (("policy", module.policy), ("critic", module.critic))
    names = {f"{owner}.{name}" for owner, m in models for name, p in m.named_parameters() if id(p) in learned}
    assert names and all("lora_" in name or name == "critic.head.weight" for name in names)


def test_a_policy_that_comes_frozen_trains_its_adapters_alone(policy, reward_model, ppo):
    """Its own weights are the reference."""
    module = ppo(add_lora(policy, R4).requires_grad_(False), reward_model, advantage=MonteCarlo())
    names = {name for name, p in module.policy.named_parameters() if p.requires_grad}
    assert names and all("lora_" in name for name in names)


@pytest.mark.parametrize("update", [ReferenceUpdate(ema=0.9), ReferenceUpdate(refresh_every=2)])
def test_a_moving_reference_is_refused(update, policy, ppo):
    with pytest.raises(UserError, match="with LoRA there is no copy of the policy that could move"):
        ppo(add_lora(policy, R4), reference=update)


def test_the_reward_stage_with_adapters(tmp_path, family, reward_model_of, tokenizer, optimizer, fit):
    rows = [{"prompt": f"Question {i}?", "responses": ["good", "bad"], "ranks": [1, 2]} for i in range(24)]
    write_jsonl(tmp_path / "r.jsonl", rows)
    model = add_lora(reward_model_of(family), R4)
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    data = RewardDataModule(tmp_path / "r.jsonl", tokenizer, batch_size=8, held_out=0.2)
    data.setup()
    module = RewardModule(model, **data.for_module(), optimizer=optimizer)
    fit(module, data, max_epochs=4)
    module.trainer.validate(module, datamodule=data, verbose=False)
    assert module.figures()["val_accuracy"] == 1.0
    changed = {name for name, p in model.named_parameters() if (p != kept[name]).any()}
    assert changed == {name for name in kept if "lora_" in name or name == "score.weight"}
    module.export(tmp_path)
    loaded, said = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"] and not lora_layers(loaded)
    sequences = [s for item in data.val_set for s in item.sequences]
    expected = module.scores(sequences)
    with torch.no_grad():
        plain = torch.cat([loaded(torch.tensor([s])).logits[:, 0] for s in sequences])
    shifted = plain + loaded.config.score_shift
    assert_close(shifted, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))
    assert loaded.config.score_shift == model.config.score_shift != 0
