"""Adapters: no change at first, few weights to train, and a plain model in the end."""

import copy
import dataclasses
import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn, tensor
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from lit_rlhf.errors import UserError
from lit_rlhf.models import (
    LoRA,
    add_lora,
    critic_from_policy,
    critic_from_reward_model,
    critic_on_policy,
    load_policy,
    load_reward_model,
    packed_hidden,
    policy_from_config,
    save_model,
)
from lit_rlhf.models.adapters import adapters_off, lora_layers, merged
from lit_rlhf.models.heads import packed_scores
from lit_rlhf.models.lora import save_adapter
from lit_rlhf.text import load_tokenizer, pack

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
        assert_close(packed_hidden(critic.backbone, rows), hidden, rtol=1e-4, atol=1e-4)
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


# ------------------------------------------------------------------------------------------------- adapter folders


@pytest.fixture
def saved(policy, tokenizer, tmp_path):
    """(folder of a base, folder of an adapter of it, logits with both)"""
    save_model(policy, tokenizer, tmp_path / "base")
    model = stirred(load_policy(tmp_path / "base", tokenizer, lora=LoRA(r=4))).eval()
    save_adapter(model, tokenizer, tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter", model(TOKENS).logits


def test_a_run_starts_from_an_adapter(saved, tokenizer, capsys):
    base, adapter, expected = saved
    scale = 1e-5 * max(1.0, expected.abs().max().item())
    plain = load_policy(adapter, load_tokenizer(adapter))
    assert "an adapter, added into the weights of its base" in capsys.readouterr().out
    assert not lora_layers(plain) and all(p.requires_grad for p in plain.parameters())
    assert_close(plain.eval()(TOKENS).logits, expected, rtol=0, atol=scale)
    fresh = load_policy(adapter, tokenizer, lora=LoRA(r=2)).eval()  # merged, and a fresh one: the reference of PPO
    assert {layer.r["default"] for layer in lora_layers(fresh).values()} == {2}
    with adapters_off(fresh):
        assert_close(fresh(TOKENS).logits, expected, rtol=0, atol=scale)
    on = load_policy(base, tokenizer, lora=LoRA(path=adapter)).eval()  # the same one goes on
    assert torch.equal(on(TOKENS).logits, expected)
    assert {n for n, p in on.named_parameters() if p.requires_grad} == {
        n for n, _ in on.named_parameters() if "lora_" in n
    }
    backbone = load_reward_model(adapter, tokenizer, new_head=True)
    assert_close(backbone.base_model.state_dict(), plain.base_model.state_dict())


@pytest.mark.parametrize("trained", [None, "the new rows"])
def test_an_adapter_finds_the_rows_again_by_which_its_base_grew(trained, policy, tokenizer, tmp_path, capsys):
    """They are in no file where they are not trained: drawn anew they were others, and its answers, too."""
    rows = len(tokenizer)
    save_model(policy, tokenizer, tmp_path / "base")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|stop|>"]})
    lora = LoRA(r=4, trainable_token_indices=trained and [rows, rows + 1])
    torch.manual_seed(0)
    model = stirred(load_policy(tmp_path / "base", tokenizer, lora=lora)).eval()
    said = f"lora.trainable_token_indices=[{rows}, {rows + 1}] asks for it"
    assert said in capsys.readouterr().out
    save_adapter(model, tokenizer, tmp_path / "adapter")
    tokens = torch.cat([TOKENS, torch.tensor([[rows, rows + 1]]).expand(len(TOKENS), 2)], 1)
    expected = model(tokens).logits
    torch.manual_seed(5)
    merged_one = load_policy(tmp_path / "adapter", tokenizer).eval()
    assert_close(merged_one(tokens).logits, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))
    on = load_policy(tmp_path / "base", tokenizer, lora=LoRA(path=tmp_path / "adapter")).eval()
    assert torch.equal(on(tokens).logits, expected)
    new = model.get_input_embeddings()(tokens[0, -2:])
    assert (new[0] - new[1]).abs().max() > 1e-3  # two tokens, not one


def test_a_base_is_found_from_the_adapters_folder_too(saved, tokenizer):
    base, adapter, expected = saved
    name_base(adapter, f"../{base.name}")
    loaded = load_policy(adapter, tokenizer).eval()
    assert_close(loaded(TOKENS).logits, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))


def name_base(adapter, base):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": base}))


def without(adapter, change):
    weights = load_file(adapter / "adapter_model.safetensors")
    change(weights, next(n for n in weights if "lora_A" in n))
    save_file(weights, adapter / "adapter_model.safetensors")


def anonymous(adapter):
    """As peft writes it: without what ours say of their base."""
    without(adapter, lambda weights, name: None)


def other_weights(folder):
    weights = load_file(folder / "model.safetensors")
    save_file({n: w + 0.01 for n, w in weights.items()}, folder / "model.safetensors", {"format": "pt"})


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda a: without(a, lambda w, n: w.pop(n)), "an adapter of .*base, which does not fit .*: it has no"),
        (lambda a: without(a, lambda w, n: w.update(odd=torch.ones(1))), "which does not fit .*the model has no odd"),
        (lambda a: without(a, lambda w, n: w.update({n: torch.ones(4, 3)})), "which does not fit .*size mismatch"),
        (lambda a: without(a, lambda w, n: w[n].fill_(torch.nan)), r"lora_A.weight holds \d+ of \d+ numbers that"),
        (lambda a: cut(a / "adapter_model.safetensors"), r"adapter_model.safetensors: cut off or damaged"),
        (lambda a: (a / "adapter_model.safetensors").rename(a / "adapter_model.bin"), "adapter_model.bin cannot"),
        (lambda a: (anonymous(a), name_base(a, "some/other")), "an adapter of some/other, and this run starts from"),
        (lambda a: name_base(a, None), "names no model that the adapter is for"),
    ],
)  # fmt: skip
def test_an_adapter_for_another_base_is_refused(break_it, message, saved, tokenizer):
    base, adapter, _ = saved
    break_it(adapter)
    with pytest.raises(UserError, match=message) as error:
        load_policy(base, tokenizer, lora=LoRA(path=adapter))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "peft's"])
def test_an_adapter_of_another_model_of_its_shapes_and_name_is_refused(saved, tokenizer, tmp_path, ours):
    base, adapter, _ = saved
    other = shutil.copytree(base, tmp_path / "elsewhere" / base.name)
    other_weights(other)
    if not ours:
        anonymous(adapter)
    expected = "the weights of .*elsewhere/base are others" if ours else "this run starts from .*elsewhere/base; give"
    with pytest.raises(UserError, match=expected):
        load_policy(other, tokenizer, lora=LoRA(path=adapter))


def test_a_base_that_has_changed_since_is_refused(saved, tokenizer):
    base, adapter, _ = saved
    other_weights(base)
    for settings in ({"path": adapter}, {"path": base, "lora": LoRA(path=adapter)}):
        with pytest.raises(UserError, match=r"an adapter of .*base as it was then, and the weights of .*base are"):
            load_policy(tokenizer=tokenizer, **settings)


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "peft's"])
def test_the_base_in_another_folder_and_precision_is_the_base(saved, tokenizer, tmp_path, ours):
    base, adapter, _ = saved
    save_model(load_policy(base, tokenizer, export_dtype="bfloat16"), tokenizer, tmp_path / "half")
    if not ours:
        anonymous(adapter)
    assert lora_layers(load_policy(tmp_path / "half", tokenizer, lora=LoRA(path=adapter)))


def by_peft(folder, base, settings, rows=None):
    """An adapter of peft's own that does something, and the model with it."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows is not None:
        model.resize_token_embeddings(rows)
    model = get_peft_model(model, LoraConfig(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("model_config", ["llama"], indirect=True)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_bias": True}, "q_proj has no bias that the adapter's could be added to"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "its blocks share tensors, which no plain model"),
    ],
)
def test_an_adapter_that_no_plain_model_holds_is_refused(saved, settings, message, tmp_path):
    base, *_ = saved
    by_peft(tmp_path / "peft", base, {"r": 2, "target_modules": ["q_proj"], **settings})
    with pytest.raises(UserError, match=message):
        load_policy(tmp_path / "peft")


@pytest.mark.parametrize("model_config", ["llama", "qwen3"], indirect=True)  # tied, and not
@pytest.mark.parametrize(
    "settings",
    [{"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
     {"target_modules": ["q_proj", "embed_tokens"]}],
    ids=["whole", "lora"],
)  # fmt: skip
def test_an_adapter_of_the_embedding_finds_it_with_a_row_for_padding(settings, saved, tokenizer, tmp_path):
    base, *_ = saved
    theirs = by_peft(tmp_path / "peft", base, {"r": 2, "task_type": "CAUSAL_LM", **settings})
    tokenizer.add_special_tokens({"pad_token": "<|new|>"})
    expected = theirs(TOKENS).logits
    for given in ({"path": tmp_path / "peft"}, {"path": base, "lora": LoRA(path=tmp_path / "peft")}):
        found = load_policy(tokenizer=tokenizer, **given).eval()(TOKENS).logits
        assert found.shape[-1] == expected.shape[-1] + 1
        assert_close(found[..., :-1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_config", ["llama", "qwen3"], indirect=True)  # tied, and not
@pytest.mark.parametrize("whole", [[], ["lm_head", "embed_tokens"]], ids=["frozen", "trained"])
def test_an_adapter_of_a_base_that_grew_brings_its_rows(whole, saved, tokenizer, tmp_path):
    base, *_ = saved
    before = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|stop|>"]})
    settings = {"r": 2, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"], "modules_to_save": whole or None}
    theirs = by_peft(tmp_path / "peft", base, settings, rows=len(tokenizer))
    tokens = torch.tensor([[5, len(tokenizer) - 2, len(tokenizer) - 1, 7]])
    expected = theirs(tokens).logits
    on = load_policy(base, tokenizer, lora=LoRA(path=tmp_path / "peft"))
    save_adapter(on, tokenizer, tmp_path / "again")
    for model in (on, load_policy(tmp_path / "peft", tokenizer), load_policy(tmp_path / "again", tokenizer)):
        assert_close(model.eval()(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match=r"with the adapter's tokenizer: <stage>.tokenizer.path=.*again"):
        load_policy(base, before, lora=LoRA(path=tmp_path / "again"))


@pytest.mark.parametrize("model_config", ["llama"], indirect=True)
def test_a_tied_embedding_that_is_trained_whole_stays_tied(saved, tokenizer, tmp_path):
    base, *_ = saved
    model = load_policy(base, tokenizer, lora=LoRA(r=2, modules_to_save=["embed_tokens"], ensure_weight_tying=True))
    save_adapter(stirred(model).eval(), tokenizer, tmp_path / "tied")
    read = load_policy(tmp_path / "tied", tokenizer).eval()
    assert read.lm_head.weight is read.model.embed_tokens.weight
    assert_close(read(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match=r"ensure_weight_tying=true: not for an embedding in target_modules"):
        load_policy(base, tokenizer, lora=LoRA(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True))


@pytest.mark.filterwarnings("error:.*a no-op")  # of numbers that would be copied into none
def test_an_adapter_is_put_on_a_model_without_values(saved, tokenizer):
    base, adapter, _ = saved
    for given in ({"path": adapter}, {"path": base, "lora": LoRA(path=adapter)}):
        with torch.device("meta"):  # as for a plan
            planned = load_policy(tokenizer=tokenizer, **given)
        shapes = [
            (n, p.shape, p.requires_grad) for n, p in load_policy(tokenizer=tokenizer, **given).named_parameters()
        ]
        assert [(n, p.shape, p.requires_grad) for n, p in planned.named_parameters()] == shapes


EXPERTS = {
    "model_type": "qwen3_moe", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
    "intermediate_size": 16, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [{"target_modules": "all-linear"}, {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]}],
    ids=["all", "experts"],
)
def test_adapters_of_experts_are_those_of_peft(settings, tokenizer, tmp_path):
    policy_from_config(EXPERTS, tokenizer).save_pretrained(tmp_path / "base")
    theirs = by_peft(tmp_path / "peft", tmp_path / "base", {"r": 2, "task_type": "CAUSAL_LM", **settings})
    policy = load_policy(tmp_path / "peft")
    assert_close(policy(TOKENS).logits, theirs(TOKENS).logits, rtol=1e-4, atol=1e-4)
    if settings["target_modules"] == []:
        ours = load_policy(tmp_path / "base", lora=LoRA(r=2, **settings))
        learned = {name for name, p in ours.named_parameters() if p.requires_grad}
        assert learned and all("experts" in name for name in learned)


def test_adapters_of_experts_beside_dense_layers(tokenizer, tmp_path):
    """peft adds patterns of its own for experts, which match nothing in a dense layer."""
    policy_from_config({**EXPERTS, "mlp_only_layers": [1]}, tokenizer).save_pretrained(tmp_path)
    model = stirred(load_policy(tmp_path, tokenizer, lora=LoRA(r=2))).eval()
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("experts" in name for name in learned) and any("layers.1.self_attn" in name for name in learned)
    assert_close(merged(model)(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match=r"lora: .*rank_pattern.*nothing_like_this"):
        load_policy(tmp_path, tokenizer, lora=LoRA(r=2, rank_pattern={"nothing_like_this": 4}))


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "falcon_mamba"])
def test_by_default_no_adapter_stands_where_peft_takes_none(kind, tokenizer):
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "state_size": 4,
        "expand": 2,
        "num_heads": 4,
        "head_dim": 8,
        "n_groups": 1,
    }
    config = AutoConfig.for_model(kind, **sizes, vocab_size=len(tokenizer))
    model = add_lora(AutoModelForCausalLM.from_config(config), LoRA(r=2))
    learned = {name.split(".lora_")[0].rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert "in_proj" in learned and "out_proj" not in learned


def test_an_adapter_has_its_own_settings(saved, tokenizer):
    with pytest.raises(UserError, match=r"comes with its own settings; leave lora.r, lora.use_dora out"):
        load_policy(saved[0], tokenizer, lora=LoRA(r=2, use_dora=True, path=saved[1]))


def test_the_adapter_of_a_reward_model_has_its_head(saved, tokenizer, tmp_path):
    model = stirred(load_reward_model(saved[0], tokenizer, new_head=True, lora=LoRA(r=4))).eval()
    nn.init.normal_(model.score.weight)
    save_adapter(model, tokenizer, tmp_path / "rm")
    rows = batch(tokenizer.pad_token_id)
    expected = packed_scores(model, rows)
    base = AutoModelForSequenceClassification.from_pretrained(saved[0], num_labels=1)
    by_peft = PeftModel.from_pretrained(base, tmp_path / "rm").eval()
    scale = 1e-5 * max(1.0, expected.abs().max().item())
    assert_close(by_peft(TOKENS).logits[0], expected[:1], rtol=0, atol=scale)
    assert_close(packed_scores(load_reward_model(tmp_path / "rm", tokenizer), rows), expected, rtol=0, atol=scale)
    with pytest.raises(UserError, match="the adapter of a reward model, where a language model's was expected"):
        load_policy(tmp_path / "rm", tokenizer)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_pattern": {"nothing": 2}}, "rank_pattern keys did not match"),
        ({"modules_to_save": ["nothing"]}, "lora.modules_to_save=.'nothing'.: nothing matches nothing"),
        ({"exclude_modules": ["nothing"]}, "lora.exclude_modules=.'nothing'.: nothing matches nothing"),
        ({"target_modules": "q_projj"}, "lora: Target modules q_projj not found"),
        ({"layers_to_transform": [9]}, "lora: Target modules .* not found"),
    ],
)
def test_names_that_match_nothing_are_refused(settings, message, policy):
    with pytest.raises(UserError, match=message):
        add_lora(policy, LoRA(r=2, **settings))


def test_what_peft_has_besides_is_known():
    """A setting of peft's is one of ours, is set by us, or cannot be: a new one is to be looked at."""
    known = {f.name for f in dataclasses.fields(LoraConfig)}
    by_us = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
             "inference_mode", "fan_in_fan_out", "runtime_config"}  # fmt: skip
    needs_data = {"loftq_config", "eva_config", "corda_config", "lora_ga_config"}
    not_merged = {"alora_invocation_tokens", "use_qalora", "qalora_group_size", "velora_config", "monteclora_config",
                  "use_bdlora", "arrow_config", "kasa_config", "layer_replication", "megatron_config",
                  "megatron_core"}  # fmt: skip
    ours = {f.name for f in dataclasses.fields(LoRA)} - {"path"}
    assert ours <= known
    assert known - ours <= by_us | needs_data | not_merged


@pytest.mark.parametrize("model_config", ["llama"], indirect=True)
def test_the_same_adapter_is_the_same_file_each_time(saved, tokenizer, tmp_path):
    base, adapter, _ = saved
    model = load_policy(base, tokenizer, lora=LoRA(path=adapter))
    written = set()
    for i in range(8):
        save_adapter(model, tokenizer, tmp_path / f"{i}")
        written.add((tmp_path / f"{i}" / "adapter_model.safetensors").read_bytes())
    assert len(written) == 1
