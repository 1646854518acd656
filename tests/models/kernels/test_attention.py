import copy

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from lit_rlhf.models import packed_hidden, policy_from_config, save_model
from lit_rlhf.models.kernels import use_block_attention, use_kernels
from lit_rlhf.models.kernels.attention import BY_BLOCKS, Layout, attend, block_attention, sees_before_it
from lit_rlhf.models.kernels.forward_pass import ForwardPass
from lit_rlhf.models.policy import layers, packs, predicting_positions, response_positions
from lit_rlhf.rollouts import Sampling, generate
from lit_rlhf.text import pack
from lit_rlhf.text.packing import Block

BLOCKS = [Block(2, 7), Block(1, 5), Block(3, 1)]


def heads(tokens, count, size=4, dtype=torch.float64, seed=0):
    return torch.randn(tokens, count, size, dtype=dtype, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def masks(blocks):
    """Of each block: some of what lies before a token, and itself."""
    generator = torch.Generator().manual_seed(5)
    seen = [(torch.rand(rows, 1, width, width, generator=generator) < 0.6) for rows, width in blocks]
    return [(mask | torch.eye(mask.shape[-1], dtype=torch.bool)).tril() for mask in seen]


def by_hand(query, key, value, layout, scale):
    """softmax(q k^T scale) v, a row and a head at a time."""
    group, out, start = query.shape[1] // key.shape[1], value.new_zeros(query.shape), 0
    for i, (rows, width) in enumerate(layout.blocks):
        for row in range(rows):
            seen = torch.ones(width, width).tril().bool() if layout.masks is None else layout.masks[i][row, 0]
            tokens = slice(start, start + width)
            for head in range(query.shape[1]):
                q, k, v = query[tokens, head], key[tokens, head // group], value[tokens, head // group]
                out[tokens, head] = (q @ k.T * scale).masked_fill(~seen, -torch.inf).softmax(-1) @ v
            start += width
    return out


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("behind", [0, 3])  # tokens that belong to no block
def test_attention_by_hand(behind, kv_heads, masked):
    inputs = [heads(22 + behind, count, seed=seed) for seed, count in enumerate((4, kv_heads, kv_heads))]
    layout = Layout(BLOCKS, masks(BLOCKS) if masked else None)
    grad = heads(22 + behind, 4, seed=3).detach()
    found, expected = (f(*inputs, layout, 0.3) for f in (attend, by_hand))
    assert_close(found, expected, rtol=0, atol=1e-12)
    for one, two in zip(*(torch.autograd.grad(x, inputs, grad) for x in (found, expected))):
        assert_close(one, two, rtol=0, atol=1e-12)


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
    use_block_attention(other)
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
    assert policy.config._attn_implementation == BY_BLOCKS and other.config._attn_implementation == "eager"
    exact = 1e-9 if policy.config.model_type == "gpt2" else 1e-5  # transformers' RMSNorm is float32 throughout
    for one, two in zip(*found, strict=True):
        assert_close(one, two, rtol=0, atol=exact)


def test_other_blocks_need_no_other_graph(policy):
    """torch.compile meets new shapes in every batch: it compiles twice, the second time for any number of tokens."""
    torch.compiler.reset()  # what other tests compiled counts against its limit
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    assert packs(policy.base_model)  # which is found out on a few tokens, once
    for layer in layers(policy.base_model):
        layer.compile(backend=backend)
    seen = []
    for longest in range(10, 30, 3):
        packed = pack([[5] * n for n in range(2, longest)], 0)
        packed_hidden(policy, packed)
        seen.append((len(packed.blocks), len(graphs)))
    assert len({blocks for blocks, _ in seen}) > 3
    assert seen[0][1] < seen[1][1] == seen[-1][1]


WINDOWED = {
    "model_type": "mistral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "sliding_window": 4,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64, "initializer_range": 0.4,
}  # fmt: skip
ALTERNATING = {
    **WINDOWED, "model_type": "qwen2", "layer_types": ["sliding_attention", "full_attention"],
    "use_sliding_window": True, "max_window_layers": 1,
}  # fmt: skip


@pytest.mark.parametrize("config", [WINDOWED, ALTERNATING], ids=["mistral", "qwen2"])
@pytest.mark.parametrize("share", [False, True])
def test_windows_of_each_layer_hold_in_packed_texts_that_share_prompts(config, share, tokenizer):
    """Windows are smaller than the texts; answers to one prompt are as far from it as if each stood behind it."""
    model, without = (policy_from_config({**config, "sliding_window": n}, tokenizer).double() for n in (4, 64))
    without.load_state_dict(model.state_dict())
    assert sees_before_it(model) and packs(model.base_model)
    prompt = list(range(5, 12))
    given = [[*prompt, *range(20, 29)], [*prompt, 30, 31], [*prompt, *range(40, 46)], list(range(50, 63))]
    packed = pack(given, 0, [len(text) - 7 for text in given], share_prompts=share)
    hidden = packed_hidden(model, packed)
    places, there = response_positions(packed, packed.lengths)
    for tokens, row, real in zip(given, places, there):
        alone, other = (m.base_model(torch.tensor([tokens])).last_hidden_state[0] for m in (model, without))
        assert_close(hidden[row[real]], alone, rtol=0, atol=1e-5)
        assert (other - alone).abs().max() > 0.01  # the window matters


def test_what_our_attention_would_leave_out_is_left_to_transformers(tokenizer, capsys):
    """Sinks, soft caps and biases are arguments of attention; without its packed form a model reads block by block."""
    q = torch.randn(1, 2, 5, 8)
    for name in ("softcap", "s_aux", "position_bias"):
        with pytest.raises(NotImplementedError, match=name):
            block_attention(torch.nn.Module(), q, q, q, None, Layout([Block(1, 5)]), **{name: torch.ones(1)})
    shape = {**WINDOWED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
    for kind, settings in (("gemma2", {"attn_logit_softcapping": 1.0}), ("gpt_oss", {}), ("bloom", {})):
        own = {**shape, "model_type": kind, **settings} if kind != "bloom" else {"model_type": kind, "n_layer": 2}
        if kind == "bloom":
            own |= {"hidden_size": 16, "n_head": 2, "initializer_range": 0.4}
        elif kind == "gemma2":
            own = {name: value for name, value in own.items() if "expert" not in name}
        model = policy_from_config(own, tokenizer).eval()
        assert not packs(model.base_model)
        given = [list(range(5, 5 + n)) for n in (20, 3, 11, 19)]
        packed = pack(given, 0)
        hidden = packed_hidden(model, packed)
        for tokens, start in zip(given, packed.starts):
            alone = model.base_model(torch.tensor([tokens])).last_hidden_state[0]
            assert_close(hidden[start : start + len(tokens)], alone, rtol=1e-4, atol=1e-5)


def test_under_autocast_queries_keys_and_values_are_float32(policy, rows, monkeypatch):
    seen = []
    original = torch.nn.functional.scaled_dot_product_attention

    def watched(*inputs, **settings):
        seen.append({x.dtype for x in inputs[:3]} | {original(*inputs, **settings).dtype})
        return original(*inputs, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    use_block_attention(policy)
    with torch.autocast("cpu", torch.bfloat16):
        packed_hidden(policy, rows)
    assert len(rows.blocks) > 1 and seen == [{torch.float32}] * policy.config.num_hidden_layers * len(rows.blocks)


@pytest.mark.parametrize("rows", [2, 20])
def test_in_mixed_precision_it_is_as_close_to_the_truth_as_attention_in_bfloat16(rows):
    generator = torch.Generator().manual_seed(0)
    q, k, v, out = torch.randn(4, rows, 4, 32, 16, generator=generator, dtype=torch.float64).unbind()
    module = torch.nn.Module()

    def run(attend, *inputs):
        inputs = [x.clone().requires_grad_() for x in inputs]
        with torch.autocast("cpu", torch.bfloat16):
            attended = attend(*inputs)
        return attended.double(), torch.autograd.grad(attended, inputs, out.to(attended.dtype))

    def ours(*inputs):
        return block_attention(module, *inputs, None)[0].transpose(1, 2)

    def theirs(*inputs):
        return F.scaled_dot_product_attention(*inputs, is_causal=True)

    truth, slopes = run(ours, q, k, v)
    narrow = [x.bfloat16() for x in (q, k, v)]
    errors = {}
    for name, kind in (("ours", ours), ("theirs", theirs)):
        attended, gradients = run(kind, *narrow)
        assert gradients[0].dtype == torch.bfloat16
        errors[name] = [(attended - truth).norm()] + [(g.double() - s).norm() for g, s in zip(gradients, slopes)]
    for mine, other, size in zip(errors["ours"], errors["theirs"], [truth.norm(), *(s.norm() for s in slopes)]):
        assert mine < 0.01 * size  # bfloat16 has 8 bits
        assert mine <= 1.05 * other


def test_the_rollout_engine_and_saved_models_know_it(policy, tokenizer, tmp_path):
    prompts, sampling = [[5, 6, 7], [8]], Sampling(max_new_tokens=6)
    ends = {"eos_id": -7, "pad_id": 1}

    def drawn():
        return generate(policy, prompts, sampling, seeds=[0, 1], **ends)

    before = drawn()
    use_block_attention(policy)
    assert ForwardPass.of(policy, 16) is not None
    assert torch.equal(drawn().tokens, before.tokens)
    use_kernels("plain")
    assert torch.equal(drawn().tokens, before.tokens)
    save_model(policy, tokenizer, tmp_path / "model")
    assert "_by_blocks" not in (tmp_path / "model" / "config.json").read_text()


def test_another_kind_of_attention_is_left_alone(model_config, tokenizer):
    policy = policy_from_config(model_config, tokenizer)
    policy.set_attn_implementation("eager")
    use_block_attention(policy)
    assert policy.config._attn_implementation == "eager"
