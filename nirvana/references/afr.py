"""Unstructured AFR: masks single weights by Z(|dF/dw w|) + Z(|dL/dw w|), F ReFer's features and L the loss.

Z standardises over one matrix (`nirvana.saliency.afr.terms`); the highest of all matrices together stay.
"""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from nirvana.architectures import describe
from nirvana.references.base import PrunedReference, check_request
from nirvana.references.by_scores import mask_by_scores
from nirvana.references.masks import SCOPES
from nirvana.saliency.afr import weight_scores


def prune(
    model: PreTrainedModel, tokens: Tensor, sparsity: float, *, seed: int = 0, scope: str = "both"
) -> PrunedReference:
    """See `nirvana.references.Reference`; nothing is random. Memory: the scores of all weights, 4 bytes each."""
    check_request(model, tokens, sparsity, scope, SCOPES)
    scores: dict[str, Tensor] = {}
    weight_scores(model, describe(model), tokens, lambda name, part, found: scores.__setitem__(name, found))
    return mask_by_scores(model, scores, sparsity, scope=scope)
