"""SparseGPT (arXiv 2301.00774): masks single weights and lets those that stay make up for them.

With H = X^T X over the tokens plus 1 % of its mean diagonal, and U upper triangular with U^T U = H^-1, columns are
gone through from left to right in blocks of 128. In each block the weights with the lowest w^2 / U_jj^2 go (or, at
every fourth column, two of the next four); a weight that goes moves those right of it in its row by

    - w_j / U_jj * U_j,right,

the optimal change given what lies left of it. Weights of inputs that are always 0 are set to 0 first, so that they are
among those that go. Layers are masked in order, each by what the masked ones before it hand on, as published. Exactly
as many weights go as asked, where published thresholds take all ties.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nirvana.references.base import PrunedReference
from nirvana.references.layerwise import prune_layer_by_layer
from nirvana.references.masks import lowest, lowest_of_four
from nirvana.references.moments import SecondMoments

BLOCK = 128
DAMPING = 0.01


def prune(
    model: PreTrainedModel,
    tokens: Tensor,
    sparsity: float,
    *,
    seed: int = 0,
    scope: str = "both",
    two_of_four: bool = False,
) -> PrunedReference:
    """See `nirvana.references.Reference`; nothing is random."""
    return prune_layer_by_layer(model, tokens, sparsity, scope, two_of_four, SecondMoments, _refit)


def _refit(linear: nn.Linear, inputs: SecondMoments, rate: float | None) -> Tensor:
    columns, gone = obs_columns(linear.weight, inputs.sum, rate)
    linear.weight.copy_(columns.T)
    return gone.T


def obs_columns(weight: Tensor, moments: Tensor, rate: float | None) -> tuple[Tensor, Tensor]:
    """The new weights and the bool mask of those that are gone, both transposed: ``[in, out]``, contiguous columns.

    Args:
        weight: ``[out, in]``; computed in fp32, or fp64 if it is.
        moments: X^T X, float64 ``[in, in]``; any common factor does.
        rate: fraction that goes, None for two of every four.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    columns = weight.detach().T.to(dtype, copy=True, memory_format=torch.contiguous_format)
    columns[moments.diagonal() == 0] = 0
    factor = _inverse_factor(moments).to(dtype)
    diagonal = factor.diagonal()[:, None]
    gone = torch.zeros_like(columns, dtype=torch.bool)
    inputs, outputs = columns.shape
    for start in range(0, inputs, BLOCK):
        stop = min(start + BLOCK, inputs)
        if rate is not None:
            count = round(rate * stop * outputs) - round(rate * start * outputs)
            gone[start:stop] = lowest((columns[start:stop] / diagonal[start:stop]).square(), count)
        errors = torch.empty_like(columns[start:stop])
        for j in range(start, stop):
            if rate is None and j % 4 == 0:
                four = slice(j, j + 4)
                gone[four] = lowest_of_four((columns[four] / diagonal[four]).square().T).T
            error = torch.where(gone[j], columns[j], 0) / factor[j, j]
            columns[j:stop].addr_(factor[j, j:stop], error, alpha=-1)
            columns[j].masked_fill_(gone[j], 0)  # what rounding leaves
            errors[j - start] = error
        columns[stop:] -= factor[start:stop, stop:].T @ errors
    return columns, gone


def _inverse_factor(moments: Tensor) -> Tensor:
    """U, upper triangular, U^T U = (moments + damping)^-1, float64."""
    mean = float(moments.diagonal().mean())
    # Where no input ever moves, no weight can make up for another.
    damped = moments + (DAMPING * mean or 1.0) * torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
