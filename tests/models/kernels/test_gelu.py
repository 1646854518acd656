"""GELU by fewer operations: that of transformers, in values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from lit_rlhf.models.kernels.gelu import gelu_tanh


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
