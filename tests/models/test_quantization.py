"""Frozen weights of 4 bits: what the passes compute with them, their adapters, and what comes out in the end."""

import copy

import pytest
import torch
from torch import tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from lit_rlhf.errors import UserError
from lit_rlhf.models import (
    LoRA,
    critic_from_policy,
    critic_from_reward_model,
    load_policy,
    load_reward_model,
    next_token_logits,
    packed_hidden,
    policy_from_config,
    save_model,
)
from lit_rlhf.models.adapters import adapters_off, lora_layers, merged, plain_weights
from lit_rlhf.models.heads import packed_scores
from lit_rlhf.models.lora import save_adapter
from lit_rlhf.models.quantization import is_quantized
from lit_rlhf.rollouts import Sampling, generate
from lit_rlhf.text import pack
from tests.conftest import FAMILIES
from tests.models.test_lora import TOKENS, stirred

WIDE = {"gpt2": {"n_embd": 64}, "llama": {"hidden_size": 64, "intermediate_size": 128}}  # a block has 64 weights


@pytest.fixture(params=WIDE)
def folder(request, tokenizer, tmp_path):
    """A model that is large enough to have whole blocks."""
    torch.manual_seed(0)
    config = {**FAMILIES[request.param], **WIDE[request.param]}
    save_model(policy_from_config(config, tokenizer), tokenizer, tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def policy(folder, tokenizer):
    return load_policy(folder, tokenizer, lora=LoRA(r=4), quantization="4bit").eval()


def test_matrices_take_an_eighth_and_only_adapters_learn(policy, folder, tokenizer):
    plain = load_policy(folder, tokenizer)
    for name, layer in lora_layers(policy).items():
        weight, full = layer.get_base_layer().weight, plain.get_submodule(name).weight
        assert weight.nbytes * 8 == full.nbytes
        assert not weight.requires_grad
    before = {name: p.clone() for name, p in policy.named_parameters() if not p.requires_grad}
    policy(TOKENS).logits.square().mean().backward()
    with torch.no_grad():
        policy(TOKENS)  # in evaluation mode, which lets bitsandbytes lay them out anew on some CPUs
    assert all(torch.equal(p, before[n]) for n, p in policy.named_parameters() if n in before)
    assert all(p.grad is not None for n, p in policy.named_parameters() if "lora_B" in n)


def test_all_ways_compute_the_same(policy, tokenizer):
    with adapters_off(policy):
        start = policy(TOKENS).logits
    assert torch.equal(policy(TOKENS).logits, start)
    expected = stirred(policy)(TOKENS).logits
    assert (expected - start).abs().max() > 0.01
    scale = expected.abs().max().item()
    packed = pack(TOKENS.tolist(), tokenizer.pad_token_id)
    assert_close(next_token_logits(policy, packed_hidden(policy, packed)), expected[0], rtol=0, atol=1e-5 * scale)
    assert_close(merged(policy)(TOKENS).logits, expected, rtol=0, atol=1e-5 * scale)
    assert_close(copy.deepcopy(policy)(TOKENS).logits, expected)
    drawn = generate(policy, TOKENS.tolist(), Sampling(4, temperature=0), eos_id=-1, pad_id=0)
    tokens = TOKENS.tolist()[0] + drawn.tokens[0].tolist()
    own = policy(tensor([tokens])).logits[0].log_softmax(-1)
    assert_close(drawn.logprobs[0], own[5:-1].gather(1, drawn.tokens[0][:, None])[:, 0], rtol=1e-4, atol=1e-4)


def test_the_export_is_a_plain_model_and_the_adapter_one_of_its_base(policy, folder, tokenizer, tmp_path):
    expected = stirred(policy)(TOKENS).logits
    save_model(policy, tokenizer, tmp_path / "model")
    loaded, said = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"] and not is_quantized(loaded)
    assert not hasattr(loaded.config, "quantization_config")
    assert_close(loaded(TOKENS).logits, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.state_dict().keys() == plain.state_dict().keys() == dict(plain_weights(policy)).keys()
    save_adapter(policy, tokenizer, tmp_path / "adapter")
    again = load_policy(folder, tokenizer, lora=LoRA(path=tmp_path / "adapter"), quantization="4bit").eval()
    assert torch.equal(again(TOKENS).logits, expected)


def test_critics_and_reward_models(policy, folder, tokenizer):
    critic = critic_from_policy(policy, lora=LoRA(r=2))
    assert is_quantized(critic) and len(lora_layers(critic)) == len(lora_layers(policy))
    packed = pack(TOKENS.tolist(), tokenizer.pad_token_id)
    assert_close(packed_hidden(critic.backbone, packed), packed_hidden(policy, packed))
    model = load_reward_model(folder, tokenizer, new_head=True, lora=LoRA(r=2), quantization="4bit")
    assert is_quantized(model) and model.score.weight.requires_grad and not is_quantized(model.score)
    torch.nn.init.normal_(model.score.weight)
    critic = critic_from_reward_model(policy, merged(model.eval(), quantized=True), LoRA(r=2))
    assert is_quantized(critic)
    assert_close(critic(packed, packed.ends, None), packed_scores(model, packed))
    with pytest.raises(UserError, match=r"the critic.*: weights of 4bit are frozen; .*\(ppo.critic.lora.r=16, say\)"):
        critic_from_policy(policy)


def test_without_adapters_it_is_refused(folder, tokenizer):
    for load in (load_policy, lambda *a, **k: load_reward_model(*a, new_head=True, **k)):
        with pytest.raises(UserError, match=r"4bit are frozen; train adapters on them \(<stage>.lora.r=16, say\)"):
            load(folder, tokenizer, quantization="4bit")


def test_without_the_package_it_is_named(folder, tokenizer, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package bitsandbytes: pip install 'lit_rlhf\[quantization\]'"):
        load_policy(folder, tokenizer, lora=LoRA(r=2), quantization="4bit")


def test_dora_on_4_bits(folder, tokenizer):
    model = load_policy(folder, tokenizer, lora=LoRA(r=4, use_dora=True), quantization="4bit").eval()
    expected = stirred(model)(TOKENS).logits
    scale = expected.abs().max().item()
    assert_close(merged(model)(TOKENS).logits, expected, rtol=0, atol=1e-4 * scale)
