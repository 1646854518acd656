"""Adapters: no change at first, few weights to train, and a plain model in the end."""

import copy

import pytest
import torch
from torch import nn, tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lit_rlhf.errors import UserError
from lit_rlhf.models import (
    LoRA,
    adapters_off,
    add_lora,
    critic_from_policy,
    critic_from_reward_model,
    critic_on_policy,
    load_policy,
    load_reward_model,
    lora_layers,
    merged,
    packed_hidden,
    packed_scores,
    save_model,
)
from lit_rlhf.text import pack

TOKENS = tensor([[5, 6, 7, 8, 9, 10]])
ONE_LAYER = {"gpt2": ["c_attn"], "llama": ["q_proj", "v_proj"], "qwen3": ["q_proj", "v_proj"]}


def batch(pad_id):
    return pack([[5, 6, 7, 8, 9, 10], [11, 12, 13]], pad_id)


def stirred(model):
    """Adapters that do something."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


@pytest.fixture
def adapted(policy):
    """(the model as it was, the same with adapters)"""
    return copy.deepcopy(policy), add_lora(policy, LoRA(r=4))


def test_a_model_begins_as_it_was(adapted):
    plain, model = adapted
    assert torch.equal(model(TOKENS).logits, plain(TOKENS).logits)


def test_only_adapters_are_trained(adapted):
    plain, model = adapted
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names and all("lora_" in name for name in names)
    every = sum(isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D" for m in plain.base_model.modules())
    assert len(lora_layers(model)) == every == len(names) // 2


def test_no_rank_is_no_lora(policy):
    for nothing in (None, LoRA(), LoRA(r=0)):
        assert add_lora(policy, nothing) is policy
    assert not lora_layers(policy)
    assert all(p.requires_grad for p in policy.parameters())
    assert merged(policy) is policy


def test_the_update_is_alpha_over_r_of_two_factors(adapted, model_config):
    plain, model = adapted
    stirred(model)
    for name, layer in lora_layers(model).items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        update = 16.0 / 4 * b @ a  # (out, in)
        expected = plain.get_submodule(name).weight + (update.T if model_config["model_type"] == "gpt2" else update)
        assert_close(merged(model).get_submodule(name).weight, expected)


def test_adapters_are_turned_off_and_on_again(adapted):
    plain, model = adapted
    stirred(model)
    trained, moved = [p for p in model.parameters() if p.requires_grad], model(TOKENS).logits
    with adapters_off(model) as as_it_was:
        assert_close(as_it_was(TOKENS).logits, plain(TOKENS).logits)
    assert (moved - plain(TOKENS).logits).abs().max() > 0.01
    assert torch.equal(model(TOKENS).logits, moved)
    assert [p for p in model.parameters() if p.requires_grad] == trained
    with pytest.raises(ZeroDivisionError), adapters_off(model):
        raise ZeroDivisionError
    assert torch.equal(model(TOKENS).logits, moved)


def test_turning_them_off_between_forward_and_backward_loses_no_gradient(adapted):
    _, model = adapted
    stirred(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(model(TOKENS).logits.square().mean(), trained)
    loss = model(TOKENS).logits.square().mean()
    with torch.no_grad(), adapters_off(model):
        model(TOKENS)
    loss.backward()
    for parameter, gradient in zip(trained, expected):
        assert_close(parameter.grad, gradient)


def test_adapters_that_came_frozen_stay_frozen(adapted):
    _, model = adapted
    model.requires_grad_(False)
    with adapters_off(model):
        pass
    assert not any(p.requires_grad for p in model.parameters())


def test_merged_is_a_plain_model_and_the_adapted_one_stays(adapted):
    plain, model = adapted
    stirred(model)
    whole = merged(model)
    assert not lora_layers(whole) and lora_layers(model)
    assert whole.state_dict().keys() == plain.state_dict().keys()
    assert [type(m) for m in whole.modules()] == [type(m) for m in plain.modules()]
    assert_close(whole(TOKENS).logits, model(TOKENS).logits, rtol=0, atol=1e-4)
    shared = {p.data_ptr() for p in whole.parameters()} & {p.data_ptr() for p in model.parameters()}
    own = ("lora_", "base_layer.weight")
    assert shared == {p.data_ptr() for n, p in model.named_parameters() if not any(part in n for part in own)}


def test_the_saved_folder_is_a_plain_model(adapted, tokenizer, tmp_path):
    _, model = adapted
    stirred(model)
    save_model(model, tokenizer, tmp_path / "model")
    assert not list((tmp_path / "model").glob("*adapter*"))
    loaded, said = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"]
    assert not lora_layers(loaded)
    scale = model(TOKENS).logits.abs().max().item()  # far from a fresh model's: logits are large
    assert_close(loaded(TOKENS).logits, model(TOKENS).logits, rtol=0, atol=1e-5 * max(1.0, scale))
    again = load_policy(tmp_path / "model", tokenizer, lora=LoRA(r=2))  # and may get new ones
    assert_close(again(TOKENS).logits, loaded(TOKENS).logits)
    assert lora_layers(again)


def test_chosen_matrices_only(policy, model_config):
    ends = ONE_LAYER[model_config["model_type"]]
    add_lora(policy, LoRA(r=2, target_modules=ends))
    assert {name.rpartition(".")[2] for name in lora_layers(policy)} == set(ends)
    assert len(lora_layers(policy)) == 2 * len(ends)  # two blocks


def test_longer_ends_of_names(policy, model_config):
    block = "h" if model_config["model_type"] == "gpt2" else "layers"
    end = f"{block}.1.{'attn.c_proj' if block == 'h' else 'self_attn.o_proj'}"
    add_lora(policy, LoRA(r=2, target_modules=[end]))
    assert [name.endswith(end) for name in lora_layers(policy)] == [True]


@pytest.mark.parametrize("targets", [["q_projj"], ["proj"], []])
def test_targets_that_match_nothing(policy, targets):
    with pytest.raises(UserError, match=r"matches nothing in this model, whose matrices are .*(c_attn|q_proj)"):
        add_lora(policy, LoRA(r=2, target_modules=targets))


def test_a_reward_model_keeps_its_head(policy, tokenizer, tmp_path):
    save_model(policy, tokenizer, tmp_path / "lm")
    model = load_reward_model(tmp_path / "lm", tokenizer, new_head=True, lora=LoRA(r=2)).eval()
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "score.weight" in names and all("lora_" in n or n == "score.weight" for n in names)
    assert not any("score" in name for name in lora_layers(model))
    nn.init.normal_(model.score.weight)
    stirred(model).config.score_shift = 1.5
    expected = packed_scores(model, batch(tokenizer.pad_token_id))
    save_model(model, tokenizer, tmp_path / "rm")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    assert loaded.config.score_shift == 1.5 and not lora_layers(loaded)
    scale = max(1.0, expected.abs().max().item())
    assert_close(packed_scores(loaded, batch(tokenizer.pad_token_id)), expected, rtol=0, atol=1e-5 * scale)
    assert_close(loaded(TOKENS).logits[0], expected[:1], rtol=0, atol=1e-5 * scale)


def test_critics_beside_an_adapted_policy(adapted, tokenizer, tmp_path):
    _, policy = adapted
    stirred(policy)
    rows = batch(tokenizer.pad_token_id)
    hidden = packed_hidden(policy, rows)
    trained = {id(p) for p in policy.parameters() if p.requires_grad}
    for lora in (None, LoRA(r=2)):
        critic = critic_from_policy(policy, lora=lora)
        assert_close(packed_hidden(critic.trunk, rows), hidden, rtol=1e-4, atol=1e-4)
        assert bool(lora_layers(critic)) == (lora is not None)
        learned = {name for name, p in critic.named_parameters() if p.requires_grad}
        every = {name for name, _ in critic.named_parameters()}
        assert learned == (every if lora is None else {n for n in every if "lora_" in n or n == "head.weight"})
    assert critic_on_policy(policy).head.weight.requires_grad
    assert {id(p) for p in policy.parameters() if p.requires_grad} == trained
    save_model(merged(policy), tokenizer, tmp_path)
    reward_model = load_reward_model(tmp_path, tokenizer, new_head=True)
    nn.init.normal_(reward_model.score.weight)
    critic = critic_from_reward_model(policy, reward_model, LoRA(r=2))
    assert {n for n, p in critic.named_parameters() if p.requires_grad and "lora_" not in n} == {"head.weight"}
    assert_close(critic(rows, rows.ends, None), packed_scores(reward_model, rows))


def test_without_peft_the_package_is_named(policy, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"LoRA needs the package peft: pip install 'lit_rlhf\[lora\]'"):
        add_lora(policy, LoRA(r=2))
