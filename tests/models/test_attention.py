import copy

import pytest
import torch
from torch.testing import assert_close

from lit_rlhf.models import generate, packed_hidden, policy_from_config, save_model, use_float32_attention
from lit_rlhf.models.attention import attention_in_float32
from lit_rlhf.models.generation import Sampling, Trunk
from lit_rlhf.text import pack


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(1)
    return pack([torch.randint(5, 250, (n,), generator=generator).tolist() for n in (9, 4, 17, 2)], 0)


def gradients(policy, rows):
    policy.zero_grad()
    packed_hidden(policy, rows).square().mean().backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_autocast_nothing_changes(policy, rows, dtype):
    policy = policy.to(dtype)
    other = copy.deepcopy(policy)
    use_float32_attention(other)
    assert policy.config._attn_implementation == "sdpa"  # the copy has a config of its own
    hidden = packed_hidden(other, rows)
    assert hidden.dtype == dtype
    assert torch.equal(hidden, packed_hidden(policy, rows))  # packed: the sequences' borders are seen as well
    assert_close(gradients(other, rows), gradients(policy, rows), rtol=0, atol=0)


def test_under_autocast_queries_keys_and_values_are_float32(policy, rows, monkeypatch):
    seen = []
    original = torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, value, **settings):
        seen.append({x.dtype for x in (query, key, value)} | {original(query, key, value, **settings).dtype})
        return original(query, key, value, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    use_float32_attention(policy)
    with torch.autocast("cpu", torch.bfloat16):
        packed_hidden(policy, rows)
    assert seen == [{torch.float32}] * policy.config.num_hidden_layers


def test_in_mixed_precision_it_is_closer_to_the_truth_than_attention_in_bfloat16():
    generator = torch.Generator().manual_seed(0)
    q, k, v, out = torch.randn(4, 2, 4, 32, 16, generator=generator, dtype=torch.float64).unbind()
    module = torch.nn.Module()

    def run(attend, *inputs):
        inputs = [x.clone().requires_grad_() for x in inputs]
        with torch.autocast("cpu", torch.bfloat16):
            attended = attend(*inputs)
        return attended.double(), torch.autograd.grad(attended, inputs, out.to(attended.dtype))

    def ours(*inputs):
        return attention_in_float32(module, *inputs, None, is_causal=True)[0].transpose(1, 2)

    def theirs(*inputs):
        return torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True)

    truth, slopes = run(ours, q, k, v)
    narrow = [x.bfloat16() for x in (q, k, v)]
    errors = {}
    for name, attend in (("ours", ours), ("theirs", theirs)):
        attended, gradients = run(attend, *narrow)
        assert gradients[0].dtype == torch.bfloat16
        errors[name] = [(attended - truth).norm()] + [(g.double() - s).norm() for g, s in zip(gradients, slopes)]
    for mine, other, size in zip(errors["ours"], errors["theirs"], [truth.norm(), *(s.norm() for s in slopes)]):
        assert mine < 0.01 * size  # bfloat16 has 8 bits
        assert mine <= 1.05 * other


def test_the_rollout_engine_and_saved_models_know_it(policy, tokenizer, tmp_path):
    prompts, sampling = [[5, 6, 7], [8]], Sampling(max_new_tokens=6)
    ends = {"eos_id": -7, "pad_id": 1}

    def drawn(**settings):
        return generate(policy, prompts, sampling, generator=torch.Generator().manual_seed(0), **ends, **settings)

    before = drawn()
    use_float32_attention(policy)
    assert Trunk.of(policy, 16) is not None
    assert torch.equal(drawn().tokens, before.tokens)
    assert torch.equal(drawn(lean=False).tokens, before.tokens)
    save_model(policy, tokenizer, tmp_path / "model")
    assert "sdpa_float32" not in (tmp_path / "model" / "config.json").read_text()


def test_another_kind_of_attention_is_left_alone(model_config, tokenizer):
    policy = policy_from_config(model_config, tokenizer)
    policy.set_attn_implementation("eager")
    use_float32_attention(policy)
    assert policy.config._attn_implementation == "eager"
