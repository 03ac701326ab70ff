"""Magnitude: masks the smallest |w| of each matrix, the same rate in all; the baseline of Wanda and SparseGPT."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nirvana.references.base import PrunedReference, check_request
from nirvana.references.masks import SCOPES, independent, lowest, mask_result, masked_matrices, rate_in


@torch.no_grad()
def prune(
    model: PreTrainedModel, tokens: Tensor | None, sparsity: float, *, seed: int = 0, scope: str = "both"
) -> PrunedReference:
    """See `nirvana.references.Reference`; reads no tokens, nothing is random."""
    architecture = check_request(model, None, sparsity, scope, SCOPES)
    rate = rate_in(architecture, sparsity, scope)
    small, removed = independent(model), 0
    for part in masked_matrices(architecture, scope):
        weight = small.get_parameter(part.tensor)
        gone = lowest(weight.abs(), round(rate * weight.numel()))
        weight.masked_fill_(gone, 0)
        removed += int(gone.sum())
    return mask_result(small, architecture, removed)
