"""Saliency, sparsity and gamma -> plan. Needs no weights: scores and the shapes in the configuration are enough.

Attention and MLP share the removed parameters by gamma (MLP pruning rate / attention pruning rate); within each kind
units of all layers are ranked together by their raw scores (NIRVANA, arXiv 2509.14230, global allocation).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from nirvana.architectures import Architecture, Block, describe
from nirvana.errors import NirvanaError
from nirvana.parameters import count_parameters
from nirvana.plan import BlockPlan, PruningPlan, config_fingerprint
from nirvana.removal import Removal, aligned

SCOPES = ("both", "attention", "mlp")
ROUNDINGS = ("budget", "up")
ALLOCATIONS = ("global", "uniform")


@dataclass(frozen=True)
class Rates:
    """Pruning rates per kind: removed fraction of the attention parameters and of the MLP parameters."""

    attention: float
    mlp: float


def split_sparsity(attention: int, mlp: int, sparsity: float, gamma: float, scope: str = "both") -> Rates:
    """Divide what is removed between the kinds: rate_attn = p (A + M) / (A + gamma M), rate_mlp = gamma rate_attn.

    Args:
        attention: prunable attention parameters A of the model; only the ratio to `mlp` matters.
        mlp: prunable MLP parameters M.
        sparsity: p, the removed fraction of A + M, whatever the scope: equal sparsity is equal size.
        gamma: MLP pruning rate / attention pruning rate.
        scope: "both", or the only kind that is pruned.

    Returns:
        The rates. One above 1 is clamped and the rest moved to the other kind.

    Raises:
        NirvanaError: the scope holds fewer parameters than are to be removed.
    """
    removed = sparsity * (attention + mlp)
    if scope != "both":
        share = attention if scope == "attention" else mlp
        if removed > share:
            raise NirvanaError(
                f"--sparsity {sparsity:g} of all prunable parameters exceeds the {scope} share of "
                f"{share / (attention + mlp):.1%}; lower it or use --scope both"
            )
        rate = removed / share
        return Rates(rate, 0.0) if scope == "attention" else Rates(0.0, rate)
    rate_attention = removed / (attention + gamma * mlp)
    rate_mlp = gamma * rate_attention
    if rate_mlp > 1:
        return Rates((removed - mlp) / attention, 1.0)
    if rate_attention > 1:
        return Rates(1.0, (removed - attention) / mlp)
    return Rates(rate_attention, rate_mlp)


def allocate(
    scores: Mapping[str, Tensor],
    model: nn.Module | PreTrainedConfig | Architecture,
    *,
    sparsity: float,
    gamma: float = 3.36,
    rounding: str = "budget",
    align: int = 8,
    scope: str = "both",
    allocation: str = "global",
) -> PruningPlan:
    """Choose which units stay.

    Args:
        scores: block name -> fp32 ``[units]``, larger = keep (see `nirvana.score`).
        model: the model, or only its configuration.
        sparsity: fraction of the prunable parameters (attention + MLP matrices) to remove, above 0 and below 1.
        gamma: MLP pruning rate / attention pruning rate. 3.36 is the published value for Llama-3.1-8B.
        rounding: ``"budget"`` moves the MLP threshold until the removed parameters meet `sparsity` as closely as the
            alignment allows; ``"up"`` (as published) spares neurons until widths are aligned and so removes less.
        align: kept MLP widths are multiples of this. A block that loses nothing keeps its width.
        scope: ``"both"``, ``"attention"`` or ``"mlp"``: which kind is pruned. `sparsity` counts both kinds always.
        allocation: ``"global"`` ranks units of all layers together; ``"uniform"`` gives every layer equal counts, so
            that the result is a stock checkpoint.

    Returns:
        A plan. Ties are broken by position: the unit that stands first in the model goes first.

    Raises:
        NirvanaError: an argument is out of range, or scores are missing, misshapen or not finite.
    """
    architecture = describe(model)
    check_allocation(sparsity, gamma, rounding, align, scope, allocation)
    blocks = architecture.blocks
    table = {block.name: _check_scores(scores, block) for block in blocks}
    attention = Removal([b for b in blocks if b.is_attention], table)
    mlp = Removal([b for b in blocks if not b.is_attention], table)

    rates = split_sparsity(attention.parameters, mlp.parameters, sparsity, gamma, scope)
    target = sparsity * (attention.parameters + mlp.parameters)
    choose = _uniform_widths if allocation == "uniform" else _global_widths
    groups, neurons = choose(attention, mlp, rates, target, rounding, align, scope)
    shared = allocation == "uniform"
    kept = attention.keep(groups, shared) | mlp.keep(neurons, shared)
    settings = {
        "sparsity": sparsity,
        "gamma": gamma,
        "rounding": rounding,
        "align": align,
        "scope": scope,
        "allocation": allocation,
        **getattr(scores, "settings", {}),
    }
    return make_plan(architecture, kept, settings)


def _global_widths(
    attention: Removal, mlp: Removal, rates: Rates, target: float, rounding: str, align: int, scope: str
) -> tuple[list[int], list[int]]:
    """Kept groups and neurons per block when units of all layers are ranked together."""
    # The counts are whole units below the rate, as published; the guard absorbs a product landing at 34.999...
    count = math.floor(rates.attention * attention.units + 1e-9)
    if rounding == "up":
        # As published: a unit that is spared is not made up for by another.
        neurons = math.floor(rates.mlp * mlp.units + 1e-9)
        return attention.lowest_aligned(count, 1), mlp.lowest_aligned(neurons, align)
    groups = attention.lowest(count)
    if scope == "attention":
        # Whole groups are coarse: take the neighbour if it lies nearer to the target.
        choices = [groups, attention.lowest(count + 1)]
        return min(choices, key=lambda widths: abs(attention.removed(widths) - target)), mlp.sizes
    # The MLP cannot give everything (each block keeps `align` neurons): attention then gives the rest.
    reachable = mlp.removed(mlp.lowest_aligned(mlp.units, align))
    while scope == "both" and attention.removed(groups) + reachable < target and count < attention.units:
        count += 1
        groups = attention.lowest(count)
    return groups, mlp.nearest(target - attention.removed(groups), align)


def _uniform_widths(
    attention: Removal, mlp: Removal, rates: Rates, target: float, rounding: str, align: int, scope: str
) -> tuple[list[int], list[int]]:
    """Kept groups and neurons per block, equal in every layer."""
    groups, neurons = max(attention.sizes), max(mlp.sizes)
    if rounding == "up":
        width = aligned(neurons - math.floor(rates.mlp * neurons + 1e-9), neurons, align)
        return attention.uniform(max(1, groups - math.floor(rates.attention * groups + 1e-9))), mlp.uniform(width)
    # A group in every layer is a coarse step: start from the nearest count, give more where the MLP cannot pay.
    kept = max(1, groups - round(rates.attention * groups))
    narrowest = mlp.sizes if scope == "attention" else mlp.uniform(align)
    while scope != "mlp" and kept > 1 and attention.removed(attention.uniform(kept)) + mlp.removed(narrowest) < target:
        kept -= 1
    if scope == "attention":
        choices = [attention.uniform(kept), attention.uniform(min(kept + 1, groups))]
        return min(choices, key=lambda widths: abs(attention.removed(widths) - target)), mlp.sizes
    rest = target - attention.removed(attention.uniform(kept))
    widths = [neurons, *range(neurons // align * align, 0, -align)]
    choices = [mlp.uniform(width) for width in widths if width >= min(align, neurons)]
    return attention.uniform(kept), min(choices, key=lambda chosen: abs(mlp.removed(chosen) - rest))


def make_plan(architecture: Architecture, kept: Mapping[str, tuple[int, ...]], settings: dict[str, Any]) -> PruningPlan:
    """A plan with its totals, counted from the shapes of the model before and after."""
    blocks = tuple(BlockPlan(b.name, b.unit, b.size, tuple(kept[b.name])) for b in architecture.blocks)
    prunable_after = sum(len(kept[b.name]) * b.parameters_per_unit for b in architecture.blocks)
    counted = count_parameters(architecture.config)
    before = counted if architecture.parameters is None else architecture.parameters
    totals = {
        "prunable_before": architecture.prunable_parameters,
        "prunable_after": prunable_after,
        "parameters_before": before,
        "parameters_after": before - counted + count_parameters(architecture.pruned_config(kept)),
    }
    base = {
        "name": getattr(architecture.config, "_name_or_path", "") or architecture.name,
        "config_sha256": config_fingerprint(architecture.config),
    }
    return PruningPlan(architecture.name, base, settings, totals, blocks)


def check_allocation(sparsity: float, gamma: float, rounding: str, align: int, scope: str, allocation: str) -> None:
    """Raise NirvanaError unless every argument of `allocate` is in range: before any scoring is done."""
    if not 0 < sparsity < 1:  # False for nan as well
        raise NirvanaError(f"--sparsity {sparsity} must be above 0 and below 1, e.g. 0.2 to remove 20 %")
    if not 0 < gamma < math.inf:
        raise NirvanaError(f"--gamma {gamma} must be a positive number; the published value is 3.36")
    if align < 1:
        raise NirvanaError(f"--align {align} must be at least 1; 8 suits tensor cores")
    for name, value, allowed in (
        ("rounding", rounding, ROUNDINGS),
        ("scope", scope, SCOPES),
        ("allocation", allocation, ALLOCATIONS),
    ):
        if value not in allowed:
            raise NirvanaError(f"--{name} {value!r} must be one of {', '.join(allowed)}")


def _check_scores(scores: Mapping[str, Tensor], block: Block) -> Tensor:
    if block.name not in scores:
        raise NirvanaError(f"the saliency has no scores for block {block.name}; score this model")
    score = scores[block.name].detach().float().cpu()
    if score.shape != (block.size,):
        raise NirvanaError(
            f"block {block.name} has {block.size} units, its saliency has shape {list(score.shape)}; score this model"
        )
    if not torch.isfinite(score).all():
        raise NirvanaError(f"the saliency of block {block.name} is not finite; score again with --dtype float32")
    return score
