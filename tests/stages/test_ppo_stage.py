"""PPO as it is by default, and what holds for each of its choices."""

import copy
import inspect
from functools import partial
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from lit_rlhf.models import LoRA, add_lora, policy_from_config
from lit_rlhf.pipeline.settings import compose_settings
from lit_rlhf.rollouts import Sampling
from lit_rlhf.stages import PPOModule
from lit_rlhf.stages.ppo import GAE, KLPenalty, KLPenaltyLoss, MonteCarlo, ReferenceUpdate, Scoring
from lit_rlhf.stages.ppo.objective import Objective
from lit_rlhf.training import adamw

CONF = Path(__file__).parents[2] / "conf" / "ppo"
GPT2_WITH_DROPOUT = {
    "model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128, "resid_pdrop": 0.2,
    "embd_pdrop": 0.2, "attn_pdrop": 0.2,
}  # fmt: skip


def option(group, name):
    """What an option of conf/ppo sets in the module."""
    if group != "advantage":
        return {group: instantiate(compose_settings([f"ppo/{group}={name}"]).ppo[group], _convert_="all")}
    node = OmegaConf.load(CONF / group / f"{name}.yaml")
    return {"advantage": instantiate(node.advantage, _convert_="all"), **node.module}


OPTIONS = [(g, f.stem) for g in ("advantage", "loss", "critic") for f in sorted((CONF / g).glob("*.yaml"))]
CHOICES = {
    **{f"{group}={name}": partial(option, group, name) for group, name in OPTIONS},
    "answer": lambda: {"action": "answer", "loss": KLPenaltyLoss()},
    "answer, RLOO": lambda: {"action": "answer", **option("advantage", "rloo")},
    "answer, shared critic": lambda: {"action": "answer", **option("critic", "shared")},
    "temperature": lambda: {"sampling": Sampling(max_new_tokens=8, temperature=0.7)},
    **{f"kl={e}": lambda e=e: {"kl": KLPenalty(estimator=e)} for e in ("k2", "k3", "full")},
    **{f"kl={e} in the loss": lambda e=e: {"kl": KLPenalty(estimator=e, in_loss=True)} for e in ("k2", "k3", "full")},
    "moving reference": lambda: {"reference": ReferenceUpdate(ema=0.9)},
    "LoRA": lambda: {"lora": LoRA(r=4)},
}


@pytest.mark.parametrize("choice", CHOICES)
def test_first_update_has_ratio_1_and_kl_0(choice, family, reward_model_of, ppo, train):
    settings = CHOICES[choice]()
    policy = add_lora(family, settings.pop("lora", None))
    module = train(ppo(policy, reward_model_of(family), **settings), batch_size=4)
    assert len({len(tokens) for tokens in module.batches[0].tokens}) > 1  # they were padded on the left
    off = 3e-5  # float32
    assert module.off[0] < off
    assert module.logged["ppo/first_ratio"][0] == pytest.approx(1, abs=off)
    assert abs(module.logged["ppo/first_kl"][0]) < 1e-9
    assert abs(module.logged["ppo/kl"][0]) < 1e-4
    first = module.rollouts[0]
    assert_close(first.old_logprobs, first.ref_logprobs, atol=1e-5, rtol=5e-6)
    if len(module.off) > 1:
        assert module.off[1] > 1e-4  # after a step it is not 1 any more


def test_dropout_is_off_though_the_model_has_it(tokenizer, reward_model_of, ppo, train):
    torch.manual_seed(0)
    policy = policy_from_config(GPT2_WITH_DROPOUT, tokenizer)
    module = train(ppo(policy, reward_model_of(policy)))
    assert module.off[0] < 1e-5
    assert not any(m.training for m in module.modules())


def test_score_reaches_the_last_real_token_only(reward_model, tokenizer, ppo, train):
    module = train(ppo(kl_coef=0.3, scoring=Scoring(missing_eos_penalty=0.7)))
    rollout = module.rollouts[0]
    shaped = rollout.rewards + 0.3 * (rollout.old_logprobs - rollout.ref_logprobs)
    for row, mask, sequence in zip(shaped, rollout.mask, rollout.sequences):
        raw = reward_model(torch.tensor([sequence])).logits.item()
        cut_off = sequence[-1] != tokenizer.eos_token_id
        expected = torch.zeros_like(row)
        expected[int(mask.nonzero().max())] = raw - cut_off * 0.7
        assert_close(row, expected, atol=1e-5, rtol=1e-5)


def test_sampled_tokens_are_kept(ppo, train):
    module = train(ppo())
    rollout = module.rollouts[0]
    for sequence, prompt, length in zip(rollout.sequences, module.batches[0].tokens, rollout.lengths):
        assert sequence[: len(prompt)] == prompt
        assert len(sequence) == len(prompt) + length


def test_old_logprobs_and_values_are_those_of_plain_transformers(policy, reward_model, ppo, train, logprobs_of):
    rollout = train(ppo(sampling=Sampling(8, temperature=0.7))).rollouts[0]
    for i, sequence in enumerate(rollout.sequences):
        n = int(rollout.lengths[i])
        expected = logprobs_of(policy.eval(), sequence, n, temperature=0.7)
        assert_close(rollout.old_logprobs[i, :n], expected, atol=1e-5, rtol=1e-5)
        hidden = reward_model.model(torch.tensor([sequence])).last_hidden_state[0, -n - 1 : -1]
        assert_close(rollout.values[i, :n], reward_model.score(hidden)[:, 0], atol=1e-5, rtol=1e-5)


def test_advantages_are_whitened_over_the_whole_rollout(ppo, train):
    rollout = train(ppo()).rollouts[0]
    valid = rollout.advantages[rollout.mask]
    assert_close(valid.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    assert_close(valid.std(unbiased=False), torch.tensor(1.0), atol=1e-4, rtol=0)
    assert rollout.advantages[~rollout.mask].abs().sum() == 0


def test_frozen_models_do_not_move_and_are_not_in_checkpoints(policy, reward_model, ppo, train):
    module = train(ppo(), iterations=2)
    for a, b in zip(module.reference.start.parameters(), policy.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(module.scorer.reward_model.parameters(), reward_model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert any((a != b).any() for a, b in zip(module.policy.parameters(), policy.parameters()))
    assert {name.split(".")[0] for name in module.state_dict()} >= {"policy", "critic", "iteration", "kl_coef"}
    assert not any(name.startswith(("reference", "scorer.reward_model")) for name in module.state_dict())


def test_it_learns_what_the_reward_model_likes(ppo, train):
    settings = {"kl_coef": 0.0, "ppo_epochs": 4, "minibatch_size": 32, "scoring": Scoring(missing_eos_penalty=0.0)}
    settings |= {"sampling": Sampling(max_new_tokens=2), "optimizer": partial(adamw, lr=2e-2)}
    modules = [train(ppo(kind=PPOModule, seed=seed, **settings), iterations=6, batch_size=64) for seed in range(3)]
    gained = [float(m.progress.score_last - m.progress.score_first) for m in modules]
    assert sum(gained) > 3 * 0.3  # one alone may draw badly


def test_iterations_counted_in_the_trainer(ppo, train):
    module = train(ppo(ppo_epochs=2, advantage=MonteCarlo(baseline="others"), answers_per_prompt=2), iterations=3)
    assert (int(module.iteration), int(module.progress.episodes)) == (3, 48)
    assert len(module.updates) == 3 * 2 * 4  # iterations, epochs, minibatches
    assert module.lr_schedulers().last_epoch == 24
    assert module.lr_schedulers().get_last_lr()[0] == pytest.approx(0.1 * 1e-2)  # the schedule ends where training does


def test_a_minibatch_larger_than_the_rollout_is_said(ppo, train, capsys):
    for size, said in ((8, False), (9, True)):  # of 8 answers
        module = train(ppo(minibatch_size=size, ppo_epochs=2), iterations=1)
        assert ("ppo.module.minibatch_size is 9 and a rollout has 8 answers" in capsys.readouterr().out) == said
        assert len(module.updates) == 2


def test_figures_and_export(policy, tokenizer, ppo, prompts, fit, tmp_path):
    module, data = ppo(val_samples=2), prompts()
    trainer = fit(module, data, max_epochs=1, limit_train_batches=1)
    trainer.validate(module, datamodule=data, verbose=False)
    figures = module.figures()
    assert (figures["episodes"], figures["kl_coef"]) == (8, pytest.approx(0.1))
    assert (figures["win_rate"]["n"], figures["win_rate"]["prompts"]) == (6 * 2, 6)
    module.export(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokens = torch.tensor([tokenizer("What colour is the mog?")["input_ids"]])
    assert_close(loaded(tokens).logits, module.policy(tokens).logits)


def test_validation_compares_policy_and_sft_model_by_the_same_random_numbers(ppo, prompts, fit):
    module, data = ppo(val_samples=2), prompts()
    trainer = fit(module, data, max_epochs=1, limit_train_batches=1)
    with torch.no_grad():  # back to the start
        for mine, start in zip(module.policy.parameters(), module.reference.start.parameters()):
            mine.copy_(start)
    trainer.validate(module, datamodule=data, verbose=False)
    assert module.figures()["win_rate"]["mean"] == pytest.approx(0.5)
    assert module.figures()["kl"] == pytest.approx(0, abs=1e-4)


def test_a_policy_that_comes_frozen_is_trained(policy, ppo, train):
    module = train(ppo(policy.requires_grad_(False)))
    assert any((a != b).any() for a, b in zip(module.policy.parameters(), policy.parameters()))


def test_an_advantage_of_ones_own_is_taken_as_it_is(ppo, train):
    def last_token_only(rewards, values, mask, answers_per_prompt):
        return rewards * 2, rewards * 3

    rollout = train(ppo(advantage=last_token_only, whiten=False)).rollouts[0]
    assert torch.equal(rollout.advantages, rollout.rewards * 2)
    assert torch.equal(rollout.returns, rollout.rewards * 3)
    assert rollout.values.any()  # it does not say that it needs no critic


def test_the_probe_changes_nothing(ppo, train):
    settings = {"scoring": Scoring(scale="running")}
    plain, probed = ppo(**settings), ppo(**settings, probe_rollouts=2)
    train(plain, iterations=2)
    train(probed, iterations=2)
    assert len(probed.logged["ppo/gradient_noise"]) == 1
    for (name, a), b in zip(plain.state_dict().items(), probed.state_dict().values()):
        assert torch.equal(a, b), name


def test_the_probe_measures_the_covariance_of_gradients(ppo, alone, monkeypatch):
    module, batch = alone(ppo(), batch_size=16)
    kept, losses = [], Objective.losses

    def watched(objective, minibatch):
        made = losses(objective, minibatch)
        gradients = torch.autograd.grad(made[0], list(module.policy.parameters()), retain_graph=True)
        kept.append(torch.cat([g.flatten() for g in gradients]).double())
        return made

    monkeypatch.setattr(Objective, "losses", watched)
    module.probe_rollouts = 3
    figures = module._probe(batch)
    gradients = torch.stack(kept)
    variance = gradients.var(0).sum().item()
    signal = gradients.mean(0).square().sum().item() - variance / len(kept)
    assert len(kept) == 3 * 4
    assert figures["ppo/gradient_variance"].item() == pytest.approx(variance, rel=1e-4)
    assert figures["ppo/gradient_signal"].item() == pytest.approx(signal, rel=1e-3)


def test_defaults_in_the_module_are_those_of_the_settings():
    """A notebook that names nothing gets the PPO of the command."""
    parameters = inspect.signature(PPOModule).parameters
    assert parameters["advantage"].default == option("advantage", "gae")["advantage"] == GAE()
    assert parameters["loss"].default == option("loss", "clipped")["loss"]
    default = OmegaConf.load(CONF / "default.yaml")
    for name in ("scoring", "kl", "reference"):
        assert parameters[name].default == instantiate(default[name], _convert_="all"), name
    others = {"_target_", "advantage", "loss", "critic", "scoring", "kl", "reference", "optimizer", "schedule", "ptx"}
    others |= {"sampling", "engine", "seed"}
    others |= {name for name in default.module if OmegaConf.is_missing(default.module, name)}  # the recipe's
    for name in set(default.module) - others:
        assert default.module[name] == parameters[name].default, name


def test_copying_a_policy_keeps_the_models_apart(policy, reward_model, ppo):
    module = ppo(critic=option("critic", "policy")["critic"])
    owners = [module.policy, module.reference.start, module.critic, module.scorer.reward_model]
    ids = [{p.data_ptr() for p in owner.parameters()} for owner in owners]
    assert all(not a & b for i, a in enumerate(ids) for b in ids[:i])
    assert copy.deepcopy(module) is not module
