"""The polar factor of a matrix: the derivative of the sum of its singular values."""

from __future__ import annotations

import torch
from torch import Tensor

#: Singular values up to this fraction of the largest count as zero. The Gram matrix squares them: in float64 it knows
#: those of 1e-6 to three digits, and rounding of fp32 features makes some of up to 1e-7 where there are none.
TOLERANCE = 1e-6


def polar_factor(x: Tensor) -> Tensor:
    """U V^T of x = U S V^T, from the eigenvectors of the smaller of x x^T and x^T x.

    Where x has full rank, this is the derivative of the sum of its singular values. Directions whose singular value is
    at most `TOLERANCE` of the largest have no derivative and are left out.

    Args:
        x: ``[rows, columns]``, any floating-point type, finite.

    Returns:
        float64 ``[rows, columns]``; zero where x is zero.
    """
    x = x.double()
    wide = x.shape[0] <= x.shape[1]
    values, vectors = torch.linalg.eigh(x @ x.T if wide else x.T @ x)
    roots = values.masked_fill(values <= TOLERANCE**2 * values[-1], torch.inf).rsqrt()
    inverse = (vectors * roots) @ vectors.T
    return inverse @ x if wide else x @ inverse
