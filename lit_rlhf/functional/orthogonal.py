"""Matrices whose singular values are all alike."""

from __future__ import annotations

import torch
from torch import Tensor

# Of a polynomial of degree 5 that is steep at 0: small singular values grow fast, and all end between 0.7 and 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """``matrix`` with the same singular vectors, and singular values of about 1: 0.7 to 1.2 for all that were not far
    smaller than the largest.

    Newton and Schulz's iteration, ``x <- a x + b (x x^T) x + c (x x^T)^2 x``, on the matrix divided by its norm, in its
    own precision; with the coefficients of Muon (K. Jordan, 2024, "Muon: An optimizer for hidden layers").

    Args:
        matrix: shape (rows, columns).
        steps: iterations.

    Example:
        >>> import torch
        >>> matrix = torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
        >>> [round(value, 2) for value in torch.linalg.svdvals(orthogonalize(matrix)).tolist()]
        [1.12, 0.72]
    """
    a, b, c = COEFFICIENTS
    wide = matrix.shape[0] <= matrix.shape[1]
    x: Tensor = (matrix if wide else matrix.T) / matrix.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T
