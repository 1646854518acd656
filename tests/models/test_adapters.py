"""What peft computes is what our passes, exports and engines compute, whatever the adapters are; in float64."""

import copy
import json

import pytest
import torch
from peft import PeftModel
from torch import tensor
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from lit_rlhf.models import LoRA, add_lora, next_token_logits, packed_hidden, save_model, use_kernels
from lit_rlhf.models.adapters import adapters_off, lora_layers, merged, plain_weights
from lit_rlhf.models.lora import put_adapter, save_adapter
from lit_rlhf.models.reference import Reference, ReferenceUpdate
from lit_rlhf.rollouts import Sampling, generate
from lit_rlhf.text import pack

TOKENS = tensor([[5, 6, 7, 8, 9, 10]])


def names(policy):
    """(embedding, head, matrices of attention, MLP, last norm) as the family calls them"""
    if policy.config.model_type == "gpt2":
        return "wte", "lm_head", ["c_attn"], "mlp", "ln_f"
    return "embed_tokens", "lm_head", ["q_proj", "v_proj"], "mlp", "model.norm"


SETTINGS = {
    "plain": lambda policy: LoRA(r=4),
    "rslora": lambda policy: LoRA(r=4, use_rslora=True),
    "dora": lambda policy: LoRA(r=4, use_dora=True),
    "orthogonal": lambda policy: LoRA(r=4, init_lora_weights="orthogonal"),
    "patterns": lambda policy: LoRA(r=4, rank_pattern={names(policy)[2][0]: 2}, alpha_pattern={names(policy)[2][0]: 3}),
    "one block": lambda policy: LoRA(r=4, layers_to_transform=[1], target_modules=names(policy)[2]),
    "all but": lambda policy: LoRA(r=4, exclude_modules=names(policy)[2]),
    "expression": lambda policy: LoRA(r=4, target_modules=rf".*\.1\..*({'|'.join(names(policy)[2])})"),
    "biases": lambda policy: LoRA(r=4, bias="all", lora_bias=policy.config.model_type == "gpt2"),
    "embedding and head": lambda policy: LoRA(r=4, target_modules=[*names(policy)[:2], *names(policy)[2]]),
    "dora of the embedding": lambda policy: LoRA(
        r=4, use_dora=True, target_modules=[*names(policy)[2], names(policy)[0]]
    ),
    "whole modules": lambda policy: LoRA(r=4, modules_to_save=[names(policy)[1], names(policy)[4]]),
    "a whole MLP": lambda policy: LoRA(r=4, target_modules=names(policy)[2], modules_to_save=["mlp"]),
    "tokens": lambda policy: LoRA(r=4, trainable_token_indices=[6, 9]),
}


def stirred(model):
    """Everything that is trained, moved."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(params=SETTINGS)
def lora(request, policy):
    return SETTINGS[request.param](policy)


def agree(ours, theirs):
    assert_close(ours, theirs, rtol=1e-9, atol=1e-9 * max(1.0, theirs.abs().max().item()))


def test_all_ways_compute_what_peft_computes(norms_in_float64, policy, lora, tokenizer, tmp_path):
    plain = copy.deepcopy(policy.double())
    save_model(policy, tokenizer, tmp_path / "base")
    policy.name_or_path = str(tmp_path / "base")
    model = add_lora(policy, lora)
    assert_close(model(TOKENS).logits, plain(TOKENS).logits, rtol=1e-4, atol=1e-4)  # no change at first
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    stirred(model)
    expected = model(TOKENS).logits
    assert (expected - plain(TOKENS).logits).abs().max() > 0.01
    # Packed, and merged into a plain model.
    packed = pack(TOKENS.tolist(), tokenizer.pad_token_id)
    agree(next_token_logits(model, packed_hidden(model, packed)), expected[0])
    whole = merged(model)
    assert not lora_layers(whole) and not hasattr(whole, "peft_config")
    assert {n for n, _ in whole.named_modules()} == {n for n, _ in plain.named_modules()}
    agree(whole(TOKENS).logits, expected)
    weights = dict(plain_weights(model))
    assert weights.keys() == plain.state_dict().keys()
    copied = copy.deepcopy(plain)
    copied.lm_head.weight = torch.nn.Parameter(copied.lm_head.weight.clone())
    copied.load_state_dict(weights)
    agree(copied(TOKENS).logits, expected)
    # The engine's own pass and transformers', and none of these has changed the model.
    ways = []
    for kernels in ("plain", "fast"):
        use_kernels(kernels)
        settings = {"eos_id": -1, "pad_id": 0, "seeds": range(2 * len(TOKENS))}
        ways.append(generate(model, TOKENS.tolist() * 2, Sampling(8, temperature=0.5), **settings))
    assert torch.equal(ways[0].tokens, ways[1].tokens)
    agree(ways[0].logprobs.double(), ways[1].logprobs.double())
    assert torch.equal(model(TOKENS).logits, expected)
    # Without them, and as the reference of a run that begins here and goes on.
    if lora.bias == "none":
        with adapters_off(model):
            agree(model(TOKENS).logits, plain(TOKENS).logits)
            agree(merged(model)(TOKENS).logits, plain(TOKENS).logits)
    reference = Reference(model, ReferenceUpdate())
    stirred(model)
    with torch.no_grad(), reference.as_it_began(model) as began:
        agree(began(TOKENS).logits, expected)
    # Exported: a plain folder, and one of peft's beside it.
    expected = model(TOKENS).logits
    save_model(model, tokenizer, tmp_path / "model")
    save_adapter(model, tokenizer, tmp_path / "adapter")
    loaded, said = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float64, output_loading_info=True
    )
    assert not said["missing_keys"] and not said["unexpected_keys"]
    agree(loaded(TOKENS).logits, expected)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    agree(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()(TOKENS).logits, expected)
    # And put on its base again: the same, and the same is trained.
    again = put_adapter(base, tmp_path / "adapter").eval()
    agree(again(TOKENS).logits, expected)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    assert before.keys() == model.state_dict().keys()
