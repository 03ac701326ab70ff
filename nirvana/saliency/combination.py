"""Several saliencies -> one: of several calibration batches, or of several criteria."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from nirvana.architectures import Architecture, describe
from nirvana.errors import NirvanaError
from nirvana.saliency.scores import Saliency

WAYS = ("mean", "median", "rank-mean")


def combine(
    saliencies: Sequence[Saliency],
    how: str = "mean",
    model: nn.Module | PreTrainedConfig | Architecture | None = None,
) -> Saliency:
    """One saliency of several that score the same blocks.

    Args:
        saliencies: at least one; block name -> fp32 ``[units]`` each.
        how: "mean" of the scores; or of ranks, over the units of all blocks of a kind (attention, MLP) as `allocate`
            ranks them: "median" or "rank-mean". A rank is a fraction of the units, 1 for the best; equal scores get
            the mean of their ranks.
        model: the model, or only its configuration: says which kind a block is. The mean does without.

    Returns:
        Block name -> fp32 ``[units]``, larger = keep, with the settings that all agree on, and under ``combined`` how
        and from what.

    Raises:
        NirvanaError: unknown way, nothing to combine, blocks or their sizes differ, or no model where ranks need it.
    """
    if how not in WAYS:
        raise NirvanaError(f"--combine {how!r} is unknown; known are {', '.join(WAYS)}")
    if not saliencies:
        raise NirvanaError("there is no saliency to combine; give at least one")
    first = saliencies[0]
    for other in saliencies[1:]:
        for name in {**first, **other}:
            sizes = [len(scores[name]) if name in scores else 0 for scores in (first, other)]
            if sizes[0] != sizes[1]:
                raise NirvanaError(
                    f"block {name} has {sizes[0]} scores in one saliency and {sizes[1]} in another; "
                    "combine saliencies of one model"
                )
    if how == "mean":
        kinds = [[name] for name in first]
    elif model is None:
        raise NirvanaError(f"--combine {how} ranks the units of each kind: give the model or its configuration")
    else:
        blocks = describe(model).blocks
        for block in blocks:
            if block.name not in first:
                raise NirvanaError(f"the saliency has no scores for block {block.name}; score this model")
        kinds = [[b.name for b in blocks if b.is_attention == kind] for kind in (True, False)]
    combined: dict[str, Tensor] = {}
    for names in kinds:
        if not names:
            continue
        table = torch.stack([torch.cat([scores[name].double() for name in names]) for scores in saliencies])
        if how != "mean":
            table = torch.stack([_ranks(row) for row in table])
        middle = _median(table) if how == "median" else table.mean(0)
        sizes = [len(first[name]) for name in names]
        combined |= {n: values.float().clone() for n, values in zip(names, middle.split(sizes), strict=True)}
    return Saliency({name: combined[name] for name in first}, _settings(saliencies, how))


def _ranks(scores: Tensor) -> Tensor:
    """Fraction of the units that score no more than each, float64 ``[units]``."""
    _, place, counts = scores.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2).double()[place] / len(scores)


def _median(table: Tensor) -> Tensor:
    """Of an even number, the mean of the two in the middle; torch takes the lower one."""
    ordered, count = table.sort(dim=0).values, len(table)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2


def _settings(saliencies: Sequence[Saliency], how: str) -> dict[str, Any]:
    first = saliencies[0].settings
    common = {
        key: value
        for key, value in first.items()
        if all(key in other.settings and other.settings[key] == value for other in saliencies)
    }
    own = [{key: value for key, value in s.settings.items() if key not in common} for s in saliencies]
    return {**common, "combined": {"how": how, "of": own}}
