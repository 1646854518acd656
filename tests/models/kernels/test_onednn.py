import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lit_rlhf.models.kernels import onednn, use_fast_layers, use_kernels
from lit_rlhf.models.kernels.onednn import OneDNNConv1D, OneDNNLinear, rows_to_add

BY_INTEL = onednn.by_intel


@pytest.fixture(autouse=True)
def not_by_intel(monkeypatch):
    """A processor whose float32 products are oneDNN's, whatever is there."""
    monkeypatch.setattr(onednn, "by_intel", lambda: False)


def layers_of(kind, bias=True):
    """A layer as it is, and its copy by oneDNN."""
    torch.manual_seed(0)
    plain = Conv1D(384, 256) if kind == "conv" else nn.Linear(256, 384, bias=bias)
    nn.init.normal_(plain.weight, std=0.05)
    if bias:
        nn.init.normal_(plain.bias)
    model = nn.Sequential(copy.deepcopy(plain))
    use_fast_layers(model, on_cpu=True)
    assert type(model[0]) is (OneDNNConv1D if kind == "conv" else OneDNNLinear)
    return plain, model[0]


def found(layer, x, slope):
    """Output, and gradients of input, weight and bias."""
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    return (y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], slope))


@pytest.mark.parametrize(("kind", "bias"), [("linear", True), ("linear", False), ("conv", True)])
def test_as_near_to_the_truth_as_mkl(kind, bias):
    plain, ours = layers_of(kind, bias)
    x, slope = torch.randn(3, 50, 256), torch.randn(3, 50, 384)
    truth = found(copy.deepcopy(plain).double(), x.double(), slope.double())
    for mine, other, true in zip(found(ours, x, slope), found(plain, x, slope), truth, strict=True):
        assert mine.shape == true.shape and mine.dtype == torch.float32
        assert (mine - true).norm() <= 1e-6 * true.norm() and (mine - true).norm() <= 4 * (other - true).norm()
    assert ours.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_in_other_precisions_pytorch_multiplies(kind, monkeypatch):
    plain, ours = layers_of(kind)
    monkeypatch.setattr(onednn, "_times", lambda *_: pytest.fail("oneDNN was asked"))
    x = torch.randn(4, 256)
    assert torch.equal(ours.double()(x.double()), plain.double()(x.double()))
    ours, plain = ours.float(), plain.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x), plain(x))
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(ours(x), plain(x))
    finally:
        torch.set_float32_matmul_precision("highest")


def test_on_a_processor_of_intel_mkl_multiplies(policy, monkeypatch):
    monkeypatch.setattr(onednn, "by_intel", lambda: True)
    monkeypatch.setattr(onednn, "WIDTH", 8)
    model = nn.Sequential(nn.Linear(256, 384))
    use_fast_layers(model, on_cpu=True)
    assert type(model[0]) is nn.Linear
    assert rows_to_add(policy.base_model, 33) == 0 and rows_to_add(policy.base_model.bfloat16(), 33) == 31


@pytest.mark.parametrize(
    ("known", "intel"), [("vendor_id\t: GenuineIntel\n", True), ("vendor_id\t: AuthenticAMD\n", False)]
)
def test_whose_processor_it_is(known, intel, tmp_path, monkeypatch):
    monkeypatch.setattr(onednn, "Path", lambda _: tmp_path / "cpuinfo")
    monkeypatch.setattr(onednn.platform, "processor", lambda: f"Family 6, {known}")
    for _ in range(2):  # read from the system, or asked of Python
        assert BY_INTEL.__wrapped__() is intel
        (tmp_path / "cpuinfo").write_text(known)


def test_what_is_narrow_stays_and_what_is_frozen_gets_no_gradient():
    model = nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 8))
    use_fast_layers(model, on_cpu=True)
    assert type(model[0]) is OneDNNLinear and type(model[1]) is nn.Linear
    model[0].requires_grad_(False)
    x = torch.randn(5, 256, requires_grad=True)
    model(x).sum().backward()
    assert model[0].weight.grad is None and x.grad.abs().sum() > 0


def test_few_numbers_of_rows_occur(policy, monkeypatch):
    backbone = policy.base_model.bfloat16()
    filled = {count: count + rows_to_add(backbone, count) for count in (1, 32, 33, 512, 513, 1024, 1025, 1536, 5000)}
    assert filled == {1: 32, 32: 32, 33: 64, 512: 512, 513: 576, 1024: 1024, 1025: 1152, 1536: 1536, 5000: 5120}
    assert len({count + rows_to_add(backbone, count) for count in range(1, 4097)}) == 16 + 3 * 8
    assert rows_to_add(backbone.float(), 33) == 0
    monkeypatch.setattr(onednn, "WIDTH", 32)  # wide models multiply float32 by oneDNN, too
    assert rows_to_add(backbone, 33) == 31
    use_kernels("plain")
    assert rows_to_add(backbone, 33) == rows_to_add(backbone.bfloat16(), 33) == 0
