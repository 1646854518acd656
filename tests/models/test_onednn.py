import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

from lit_rlhf.models import use_onednn


def layer_of(kind, bias=True):
    torch.manual_seed(0)
    layer = Conv1D(384, 128) if kind == "conv" else nn.Linear(128, 384, bias=bias)
    nn.init.normal_(layer.weight, std=0.05)
    if bias:
        nn.init.normal_(layer.bias)
    return layer


def found(layer, x, slope):
    """Output, and gradients of input, weight and bias."""
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    return (y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], slope))


@pytest.mark.parametrize(("kind", "bias"), [("linear", True), ("linear", False), ("conv", True)])
def test_as_near_to_the_truth_as_mkl(kind, bias):
    plain = layer_of(kind, bias)
    ours = copy.deepcopy(plain)
    use_onednn(ours, 128)
    assert type(ours) is not type(plain) and isinstance(ours, type(plain))
    x, slope = torch.randn(3, 50, 128), torch.randn(3, 50, 384)
    truth = found(copy.deepcopy(plain).double(), x.double(), slope.double())
    for mine, other, true in zip(found(ours, x, slope), found(plain, x, slope), truth, strict=True):
        assert mine.shape == true.shape and mine.dtype == torch.float32
        assert (mine - true).norm() <= 1e-6 * true.norm() and (mine - true).norm() <= 4 * (other - true).norm()
    assert ours.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_in_other_precisions_pytorch_multiplies(kind, monkeypatch):
    plain = layer_of(kind)
    ours = copy.deepcopy(plain)
    use_onednn(ours, 128)
    monkeypatch.setattr("lit_rlhf.models.onednn._times", lambda *_: pytest.fail("oneDNN was asked"))
    x = torch.randn(4, 128)
    assert torch.equal(ours.double()(x.double()), plain.double()(x.double()))
    ours, plain = ours.float(), plain.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x), plain(x))


def test_what_is_narrow_stays_and_what_is_frozen_gets_no_gradient():
    model = nn.Sequential(nn.Linear(128, 512), nn.Linear(512, 8))
    use_onednn(model, 128)
    assert type(model[0]) is not nn.Linear and type(model[1]) is nn.Linear
    model[0].requires_grad_(False)
    x = torch.randn(5, 128, requires_grad=True)
    model(x).sum().backward()
    assert model[0].weight.grad is None and x.grad.abs().sum() > 0


def test_less_precision_is_pytorchs_choice():
    layer = layer_of("linear")
    torch.set_float32_matmul_precision("medium")
    try:
        use_onednn(layer, 128)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert type(layer) is nn.Linear


def test_a_copy_and_what_is_saved_are_as_ever(tmp_path):
    layer = layer_of("linear")
    use_onednn(layer, 128)
    twin = copy.deepcopy(layer)
    x = torch.randn(2, 128)
    assert_close(twin(x), layer(x), rtol=0, atol=0)
    torch.save(layer.state_dict(), tmp_path / "w.pt")
    plain = nn.Linear(128, 384)
    plain.load_state_dict(torch.load(tmp_path / "w.pt", weights_only=True))
    assert_close(plain(x), layer(x), rtol=1e-5, atol=1e-5)
