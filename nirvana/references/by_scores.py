"""A mask from scores of single weights: the highest of all matrices together stay."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nirvana.errors import NirvanaError
from nirvana.references.base import PrunedReference, check_request
from nirvana.references.masks import SCOPES, independent, mask_result, masked_matrices, rate_in

#: A 32-bit key is looked for by its upper and then its lower half.
HALF_BITS = 16


@torch.no_grad()
def mask_by_scores(
    model: PreTrainedModel, scores: Mapping[str, Tensor], sparsity: float, *, scope: str = "both"
) -> PrunedReference:
    """Zero the lowest-scoring weights of a copy of `model`, ranked globally over all matrices of the scope.

    Exactly as many go as `sparsity` of the prunable parameters says, to the nearest weight. Scores count in fp32; of
    equals those go that stand first in the model.

    Args:
        scores: tensor name -> scores of the shape of that weight, larger = keep, for every matrix of the scope.
        sparsity: fraction of all prunable parameters.
        scope: "both" or "mlp".

    Raises:
        NirvanaError: scores are missing, of another shape or NaN, or an argument is out of range.
    """
    architecture = check_request(model, None, sparsity, scope, SCOPES)
    rate_in(architecture, sparsity, scope)
    names = [part.tensor for part in masked_matrices(architecture, scope)]
    for name in names:
        shape = list(model.get_parameter(name).shape)
        if name not in scores or list(scores[name].shape) != shape:
            found = f"of shape {list(scores[name].shape)}" if name in scores else "missing"
            raise NirvanaError(f"scores of {name} are {found}; the weight has shape {shape}")
        if torch.isnan(scores[name]).any():
            raise NirvanaError(f"scores of {name} hold NaN")
    count = round(sparsity * architecture.prunable_parameters)
    threshold, ties = _threshold(lambda: (_keys(scores[name]) for name in names), count)
    small = independent(model)
    for name in names:
        keys = _keys(scores[name])
        gone = keys < threshold
        equal = (keys == threshold).nonzero()[:ties]
        gone[equal] = True
        ties -= len(equal)
        weight = small.get_parameter(name)
        weight.masked_fill_(gone.view_as(weight).to(weight.device), 0)
    return mask_result(small, architecture, count)


def _keys(scores: Tensor) -> Tensor:
    """int64 ``[weights]``, from 0 to 2^32 - 1, in the order of the scores in fp32."""
    bits = (scores.float().flatten() + 0.0).view(torch.int32).long()  # + 0.0 makes -0 equal to 0
    return torch.where(bits < 0, -bits - 1, bits + 2**31)


def _threshold(every: Callable[[], Iterable[Tensor]], count: int) -> tuple[int, int]:
    """The key of the `count`-th lowest, and how many of its equals are among them.

    By counting, in two passes over all keys: sorting them at once would take 12 bytes a weight.
    """
    size = 1 << HALF_BITS
    upper = sum(torch.bincount(keys >> HALF_BITS, minlength=size).cpu() for keys in every())
    high, count = _bin_of(upper, count)
    lower = sum(torch.bincount(keys[keys >> HALF_BITS == high] & size - 1, minlength=size).cpu() for keys in every())
    low, count = _bin_of(lower, count)
    return high << HALF_BITS | low, count


def _bin_of(counts: Tensor, rank: int) -> tuple[int, int]:
    """The bin that holds the `rank`-th value (from 1), and its rank within the bin."""
    ends = counts.cumsum(0)
    bin_ = int(torch.searchsorted(ends, torch.tensor(rank)))
    return bin_, rank - int(ends[bin_] - counts[bin_])
