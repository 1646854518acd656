import copy

import pytest
import torch
from torch.testing import assert_close

from lit_rlhf.models import (
    generate,
    layers,
    packed_hidden,
    policy_from_config,
    predicting_positions,
    save_model,
    use_own_attention,
)
from lit_rlhf.models.attention import OWN, own_attention, sees_before_it
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
    use_own_attention(other)
    assert policy.config._attn_implementation == "sdpa"  # the copy has a config of its own
    tokens = torch.arange(5, 29).view(2, 12)
    hidden, expected = (model.base_model(tokens).last_hidden_state for model in (other, policy))
    assert hidden.dtype == dtype and torch.equal(hidden, expected)
    parameters = (list(model.base_model.parameters()) for model in (other, policy))
    slopes = [torch.autograd.grad(x.square().mean(), p) for x, p in zip((hidden, expected), parameters)]
    assert_close(*slopes, rtol=0, atol=0)


@pytest.mark.parametrize("share", [False, True])
def test_block_by_block_is_what_each_block_gives_alone(policy, share):
    """One pass over all blocks, against transformers' "eager" attention in a pass for each: values and gradients."""
    policy, sizes = policy.double(), [4, 8, 1, 12, 6, 3]
    generator = torch.Generator().manual_seed(2)

    def draw(n):
        return torch.randint(5, 250, (n,), generator=generator).tolist()

    prompts = [draw(5), draw(9)]
    packed = pack([prompts[i % 2] + draw(n) for i, n in enumerate(sizes)], 0, sizes, share_prompts=share)
    other = copy.deepcopy(policy)
    other.set_attn_implementation("eager")
    assert len(packed.blocks) > 1 and (packed.visible is not None) == share
    real = predicting_positions(packed, packed.response_lengths)
    real = real[0][real[1]]
    found = []
    for model in (policy, other):
        hidden = packed_hidden(model, packed)[real]
        found.append((hidden, *torch.autograd.grad(hidden.square().mean(), list(model.base_model.parameters()))))
    assert policy.config._attn_implementation == OWN and other.config._attn_implementation == "eager"
    exact = 1e-9 if policy.config.model_type == "gpt2" else 1e-5  # transformers' RMSNorm is float32 throughout
    for one, two in zip(*found, strict=True):
        assert_close(one, two, rtol=0, atol=exact)


def test_other_blocks_need_no_other_graph(policy):
    """torch.compile meets new shapes in every batch: it compiles twice, the second time for any number of tokens."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    for layer in layers(policy.base_model):
        layer.compile(backend=backend)
    seen = []
    for longest in range(10, 30, 3):
        packed = pack([[5] * n for n in range(2, longest)], 0)
        packed_hidden(policy, packed)
        seen.append((len(packed.blocks), len(graphs)))
    assert len({blocks for blocks, _ in seen}) > 3
    assert seen[0][1] < seen[1][1] == seen[-1][1]


def test_a_model_that_looks_back_otherwise_reads_block_by_block(model_config, tokenizer):
    """A window on attention, or layers that carry on from token to token, are left to transformers."""
    mistral = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
               "num_key_value_heads": 1, "sliding_window": 4, "max_position_embeddings": 64}  # fmt: skip
    model = policy_from_config({"model_type": "mistral", **mistral}, tokenizer)
    assert not sees_before_it(model)
    given = [list(range(5, 5 + n)) for n in (20, 3, 11, 19)]
    packed = pack(given, 0)
    hidden = packed_hidden(model, packed)
    for tokens, start in zip(given, packed.starts):
        alone = model.base_model(torch.tensor([tokens])).last_hidden_state[0]
        assert_close(hidden[start : start + len(tokens)], alone, rtol=1e-4, atol=1e-5)
    assert model.config._attn_implementation == "sdpa"


def test_under_autocast_queries_keys_and_values_are_float32(policy, rows, monkeypatch):
    seen = []
    original = torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, value, **settings):
        seen.append({x.dtype for x in (query, key, value)} | {original(query, key, value, **settings).dtype})
        return original(query, key, value, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    use_own_attention(policy)
    with torch.autocast("cpu", torch.bfloat16):
        packed_hidden(policy, rows)
    assert len(rows.blocks) > 1 and seen == [{torch.float32}] * policy.config.num_hidden_layers * len(rows.blocks)


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
        return own_attention(module, *inputs, None, is_causal=True)[0].transpose(1, 2)

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
    use_own_attention(policy)
    assert Trunk.of(policy, 16) is not None
    assert torch.equal(drawn().tokens, before.tokens)
    assert torch.equal(drawn(lean=False).tokens, before.tokens)
    save_model(policy, tokenizer, tmp_path / "model")
    assert "sdpa_by_blocks" not in (tmp_path / "model" / "config.json").read_text()


def test_another_kind_of_attention_is_left_alone(model_config, tokenizer):
    policy = policy_from_config(model_config, tokenizer)
    policy.set_attn_implementation("eager")
    use_own_attention(policy)
    assert policy.config._attn_implementation == "eager"
