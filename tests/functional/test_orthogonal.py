import pytest
import torch
from torch.testing import assert_close

from lit_rlhf.functional import orthogonalize


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5), (1, 7)])
def test_singular_vectors_stay_and_values_become_one(shape):
    """By the decomposition, on which the polynomial acts value by value."""
    torch.manual_seed(0)
    matrix = torch.randn(shape).double()
    u, values, v = torch.linalg.svd(matrix, full_matrices=False)
    x = values / values.norm()
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    assert_close(orthogonalize(matrix), u @ torch.diag(x) @ v)
    assert x.min() > 0.65 and x.max() < 1.25


def test_it_is_pytorchs_but_for_rounding():
    torch.manual_seed(0)
    parameter, gradient = torch.nn.Parameter(torch.zeros(8, 12)), torch.randn(8, 12)
    parameter.grad = gradient.clone()
    torch.optim.Muon([parameter], lr=1.0, momentum=0.0, weight_decay=0.0).step()  # in bfloat16
    assert_close(orthogonalize(gradient), -parameter.data, rtol=0, atol=0.04)


def test_a_matrix_of_zeros_stays_one():
    assert torch.equal(orthogonalize(torch.zeros(3, 4)), torch.zeros(3, 4))
