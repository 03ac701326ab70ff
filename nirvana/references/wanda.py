"""Wanda (arXiv 2306.11695): masks single weights by |W_ij| sqrt(S_j), S_j = mean over tokens of x_j^2.

The lowest of each output row go, the same rate in every matrix; or the two lowest of every four along the inputs. No
weight is changed. Layers are masked in order, each by what the masked ones before it hand on, as published.

S is a mean over tokens where the code averages sums over sequences: a common factor of each matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nirvana.references.base import PrunedReference
from nirvana.references.layerwise import prune_layer_by_layer
from nirvana.references.masks import lowest_in_rows, lowest_of_four
from nirvana.saliency.activations import InputStatistics


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
    return prune_layer_by_layer(model, tokens, sparsity, scope, two_of_four, InputStatistics, _mask)


def _mask(linear: nn.Linear, inputs: InputStatistics, rate: float | None) -> Tensor:
    weight = linear.weight
    sizes = inputs.mean_square.sqrt().to(torch.promote_types(weight.dtype, torch.float32))
    scores = weight.abs() * sizes
    gone = lowest_of_four(scores) if rate is None else lowest_in_rows(scores, rate)
    weight.masked_fill_(gone, 0)
    return gone
