"""Functions by fewer operations: those that transformers has, in values and gradients."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from lit_rlhf.models import layers, load_policy, packed_hidden, policy_from_config, save_model
from lit_rlhf.models.fused import FUSED, NORMS, TURNING, _Gelu, _RMSNorm, _Turn, gelu_tanh
from lit_rlhf.text import pack

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
SCALED = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip
LLAMAS = {
    "llama": {"model_type": "llama"},
    "llama, biases, scaled positions": {"model_type": "llama", "attention_bias": True, "rope_parameters": SCALED},
    "llama, width of a head": {"model_type": "llama", "head_dim": 6},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
}


@pytest.fixture(params=LLAMAS)
def plain(request, tokenizer):
    """A model as transformers has it, its biases and gains stirred."""
    torch.manual_seed(0)
    model = policy_from_config({**SHAPE, **LLAMAS[request.param]}, tokenizer, fused=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def fused_copy(model, folder, tokenizer, dtype="float32"):
    save_model(model, tokenizer, folder)
    return load_policy(folder, dtype=dtype).eval()


def turning(model):
    return [layer.self_attn for layer in layers(model) if type(layer.self_attn) in TURNING.values()]


@pytest.mark.parametrize("name", ["gelu_new", "gelu_pytorch_tanh"])
def test_gelu_is_the_same_function_and_leaves_no_trace(name, tokenizer, tmp_path):
    config = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "n_inner": 32}
    config["activation_function"] = name
    torch.manual_seed(0)
    plain = policy_from_config(config, tokenizer, fused=False).eval().double()
    fused = fused_copy(plain, tmp_path, tokenizer, "float64")
    assert isinstance(fused.transformer.h[1].mlp.act, _Gelu)
    assert fused.config.activation_function == name
    assert not isinstance(load_policy(tmp_path, fused=False).transformer.h[1].mlp.act, _Gelu)
    ids = torch.arange(20)[None]
    for model in (plain, fused):
        model(input_ids=ids, labels=ids).loss.backward()
    assert_close(fused(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=0, atol=1e-12)
    for one, other in zip(fused.parameters(), plain.parameters()):
        assert_close(one.grad, other.grad, rtol=0, atol=1e-12)


def test_gelu_by_hand():
    """Φ(1) is about 0.8413, by the tanh 0.8412; far out it is 0 or x; the derivative is that of float64 differences."""
    x = torch.tensor([-40.0, -1.0, 0.0, 1.0, 40.0], dtype=torch.float64)
    inner = (2 / torch.pi) ** 0.5 * 1.044715
    half = torch.tensor(inner, dtype=torch.float64).tanh() / 2
    assert_close(gelu_tanh(x), torch.stack([x[0] * 0, half - 0.5, x[2], half + 0.5, x[4]]), rtol=0, atol=1e-15)
    assert gelu_tanh(x)[3].item() == pytest.approx(0.8412, abs=5e-5)
    x = torch.linspace(-6, 6, 48, dtype=torch.float64).view(3, 16).requires_grad_()
    assert torch.autograd.gradcheck(gelu_tanh, x)


def test_errors_of_gelu_are_those_of_float32():
    x = 4 * torch.randn(200, 200, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(gelu_tanh(x), gelu_tanh(x.clone().requires_grad_()))
    exact, ours = x.double().requires_grad_(), x.clone().requires_grad_()
    values = F.gelu(exact, approximate="tanh"), gelu_tanh(ours)
    for value in values:
        value.sum().backward()
    assert (values[1] - values[0]).abs().max() < 1e-6
    assert (ours.grad - exact.grad).abs().max() < 3e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gelu_of_half_precision_is_pytorchs(dtype):
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    assert torch.equal(gelu_tanh(x), F.gelu(x, approximate="tanh"))


def test_positions_by_hand():
    """A head of two: the pair is turned by the angle; the backward pass turns back, as float64 differences say."""
    angle = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    cos, sin = (f(angle)[None, :, None].expand(1, 3, 2) for f in (torch.cos, torch.sin))
    queries = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(1, 3, 1, 2)
    keys = torch.tensor([0.0, 2.0], dtype=torch.float64).expand(1, 3, 1, 2)
    turned = _Turn.apply(queries, keys, cos, sin)
    assert_close(turned[0][0, :, 0], torch.stack([angle.cos(), angle.sin()], -1))
    assert_close(turned[1][0, :, 0], 2 * torch.stack([-angle.sin(), angle.cos()], -1))
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(1, 3, h, 2, generator=generator, dtype=torch.float64, requires_grad=True) for h in (2, 1)]
    assert torch.autograd.gradcheck(lambda q, k: _Turn.apply(q, k, cos, sin), x)


@pytest.fixture
def norms_in_float64(monkeypatch):
    """transformers computes RMSNorm in float32 throughout; PyTorch's own stands in for it."""
    for norm in NORMS:
        monkeypatch.setattr(
            norm, "forward", lambda self, x: F.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)
        )


def test_positions_and_norms_are_those_of_transformers(norms_in_float64, plain, tokenizer, tmp_path):
    plain = plain.double()
    fused = fused_copy(plain, tmp_path, tokenizer, "float64")
    assert not any(type(m) in NORMS for m in fused.modules())
    assert len(turning(fused)) == 2 and not turning(plain)
    packed = pack([[5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16]], 0)
    found = []
    for model in (plain, fused):
        hidden = packed_hidden(model, packed)
        found.append((hidden, *torch.autograd.grad(hidden.sin().sum(), list(model.base_model.parameters()))))
    for one, other in zip(*found, strict=True):
        assert_close(one, other, rtol=1e-10, atol=1e-10)
    ids = torch.arange(5, 25).view(2, 10)
    assert_close(fused(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=0, atol=1e-10)


def test_every_fused_class_is_compared_with_its_own(tokenizer):
    """By the tests above, of these models."""
    models = [policy_from_config({**SHAPE, **config}, tokenizer) for config in LLAMAS.values()]
    assert {type(module) for model in models for module in model.modules()} >= {*FUSED.values()}


def test_norm_by_hand():
    """(3, 4) has the mean square 12.5; the backward pass is what differences in float64 say."""
    x, gain = torch.tensor([[3.0, 4.0]], dtype=torch.float64), torch.tensor([1.0, 10.0], dtype=torch.float64)
    normed = _RMSNorm.apply(x, gain, 0.5, torch.float64)
    assert_close(normed, torch.tensor([[3.0, 40.0]], dtype=torch.float64) / 13.0**0.5)
    x = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    gain = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, gain: _RMSNorm.apply(x, gain, 1e-5, torch.float64), (x, gain))


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_norms_before_products_give_what_products_want(kind, tokenizer, tmp_path):
    torch.manual_seed(0)
    model = policy_from_config({**SHAPE, **LLAMAS[kind]}, tokenizer)
    seen = {}
    for name, module in model.named_modules():
        if type(module) in NORMS.values():
            module.register_forward_hook(lambda *x, name=name: seen.update({name: x[-1].dtype}))
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=torch.arange(5, 15)[None])
    read_by_others = {name for name in seen if name.endswith(("model.norm", "q_norm", "k_norm"))}
    assert {seen[name] for name in seen.keys() - read_by_others} == {torch.bfloat16}
    assert {seen[name] for name in read_by_others} == {torch.float32}
    model(input_ids=torch.arange(5, 15)[None])
    assert set(seen.values()) == {torch.float32}


def test_in_mixed_precision_both_are_as_close_to_float32(plain, tokenizer, tmp_path):
    fused = fused_copy(plain, tmp_path, tokenizer)
    ids = torch.arange(5, 45).view(2, 20)
    exact = plain(input_ids=ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        off = [(model(input_ids=ids).logits - exact).abs().mean() for model in (fused, plain)]
    assert off[0] < 1.2 * off[1]


def test_with_a_cache_and_with_eager_attention_transformers_goes_on(plain, tokenizer, tmp_path):
    fused = fused_copy(plain, tmp_path, tokenizer)
    ids = torch.arange(5, 15)[None]
    asked = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(fused.generate(ids, **asked), plain.generate(ids, **asked))
    fused.set_attn_implementation("eager")
    assert_close(fused(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=0, atol=1e-5)


def test_copies_and_files_are_as_before(plain, tokenizer, tmp_path):
    fused = fused_copy(plain, tmp_path / "one", tokenizer)
    save_model(fused, tokenizer, tmp_path / "two")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "two")
    assert not turning(again)
    assert (tmp_path / "one/config.json").read_text() == (tmp_path / "two/config.json").read_text()
    assert_close(dict(again.state_dict()), dict(plain.state_dict()), rtol=0, atol=0)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert len(turning(other)) == 2
