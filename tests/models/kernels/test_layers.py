"""Modules that are exchanged for faster ones: the same functions, weights and names, and back by one setting."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from lit_rlhf.models import policy_from_config, save_model, use_kernels
from lit_rlhf.models.kernels import onednn, use_fast_layers
from lit_rlhf.models.kernels.gelu import GELUTanh

CONFIG = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "n_inner": 32}


@pytest.fixture
def narrow(monkeypatch):
    """oneDNN multiplies in layers as small as a test's, too."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch without oneDNN")
    monkeypatch.setattr(onednn, "WIDTH", 8)
    monkeypatch.setattr(onednn, "by_intel", lambda: False)


def made(tokenizer, **settings):
    torch.manual_seed(0)
    return policy_from_config({**CONFIG, **settings}, tokenizer).eval()


def kinds(model):
    return {type(module) for module in model.modules()}


@pytest.mark.parametrize("name", ["gelu_new", "gelu_pytorch_tanh"])
def test_gelu_is_the_same_function(name, tokenizer):
    plain = made(tokenizer, activation_function=name).double()
    fast = copy.deepcopy(plain)
    use_fast_layers(fast, on_cpu=True)
    assert GELUTanh in kinds(fast) and fast.config.activation_function == name
    ids = torch.arange(20)[None]
    for model in (plain, fast):
        model(input_ids=ids, labels=ids).loss.backward()
    assert_close(fast(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=0, atol=1e-12)
    for one, other in zip(fast.parameters(), plain.parameters()):
        assert_close(one.grad, other.grad, rtol=0, atol=1e-12)


def test_parameters_and_names_stay_and_twice_is_as_good_as_once(narrow, tokenizer):
    model = made(tokenizer)
    before = dict(model.named_parameters())
    for _ in range(2):
        use_fast_layers(model, on_cpu=True)
        modules = kinds(model)
        assert {GELUTanh, onednn.OneDNNConv1D, onednn.OneDNNLinear} <= modules
    after = dict(model.named_parameters())
    assert list(before) == list(after) and all(before[name] is after[name] for name in before)
    assert model.lm_head.weight is model.transformer.wte.weight  # tied as they were
    assert not any(isinstance(m.plain, GELUTanh) for m in model.modules() if isinstance(m, GELUTanh))
    assert not any(module.training for module in model.modules())


def test_a_layer_in_two_places_stays_one_and_one_with_hooks_stays(narrow):
    shared, watched = nn.Linear(16, 16), nn.Linear(16, 16)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared), "c": nn.Sequential(watched)})
    watched.register_forward_hook(lambda *_: None)
    use_fast_layers(model, on_cpu=True)
    assert model["a"][0] is model["b"][0] is not shared
    assert model["c"][0] is watched


def test_elsewhere_than_on_a_cpu_products_stay(narrow, tokenizer):
    model = made(tokenizer)
    use_fast_layers(model, on_cpu=False)
    assert GELUTanh in kinds(model) and not {onednn.OneDNNConv1D, onednn.OneDNNLinear} & kinds(model)


def test_plain_kernels_are_transformers_own_to_the_bit(narrow, tokenizer):
    plain, ids = made(tokenizer), torch.arange(20)[None]
    fast = copy.deepcopy(plain)
    use_fast_layers(fast, on_cpu=True)
    expected = plain(input_ids=ids).logits
    assert not torch.equal(fast(input_ids=ids).logits, expected)
    assert_close(fast(input_ids=ids).logits, expected, rtol=0, atol=1e-5)
    use_kernels("plain")
    assert torch.equal(fast(input_ids=ids).logits, expected)


def test_copies_and_files_are_as_before(narrow, tokenizer, tmp_path):
    plain, ids = made(tokenizer), torch.arange(20)[None]
    fast = copy.deepcopy(plain)
    use_fast_layers(fast, on_cpu=True)
    for model, folder in ((plain, tmp_path / "plain"), (fast, tmp_path / "fast")):
        save_model(model, tokenizer, folder)
    assert {f.name: f.read_bytes() for f in (tmp_path / "plain").iterdir()} == {
        f.name: f.read_bytes() for f in (tmp_path / "fast").iterdir()
    }
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "fast")(ids).logits, plain(ids).logits)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert kinds(other) == kinds(fast) and torch.equal(other(ids).logits, fast(ids).logits)
