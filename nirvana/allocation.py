"""Saliency, sparsity and gamma -> plan. Needs no weights: scores and the shapes in the configuration are enough.

Attention and MLP share the removed parameters by gamma (MLP pruning rate / attention pruning rate); within each kind
units of all layers are ranked together by their raw scores (NIRVANA, arXiv 2509.14230, global allocation).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from nirvana.architectures import Architecture, Block, describe
from nirvana.errors import NirvanaError
from nirvana.parameters import count_parameters
from nirvana.plan import BlockPlan, PruningPlan, config_fingerprint
from nirvana.retention import keep_units
from nirvana.widths import WidthRule


def allocate(
    scores: Mapping[str, Tensor],
    model: nn.Module | PreTrainedConfig | Architecture,
    *,
    sparsity: float,
    gamma: float | Mapping[str, float] = 3.36,
    rounding: str = "budget",
    align: int = 8,
    scope: str = "both",
    allocation: str = "global",
    max_widths: int | None = None,
    tensor_parallel: int = 1,
) -> PruningPlan:
    """Choose which units stay.

    Args:
        scores: block name -> fp32 ``[units]``, larger = keep (see `nirvana.score`).
        model: the model, or only its configuration.
        sparsity: fraction of the prunable parameters (attention + MLP matrices) to remove, above 0 and below 1.
        gamma: MLP pruning rate / attention pruning rate. 3.36 is the published value for Llama-3.1-8B. For an
            encoder-decoder also ``{"encoder": 3, "decoder": 2, "cross": 1.5}``: the kinds of attention are then ranked
            apart, each pruned at the MLPs' rate / its gamma (MLPs of both stacks share one rate and one ranking).
        rounding: ``"budget"`` moves the MLP threshold until the removed parameters meet `sparsity` as closely as the
            alignment allows; ``"up"`` (as published) spares neurons until widths are aligned and so removes less.
        align: kept MLP widths are multiples of this. A block that loses nothing keeps its width.
        scope: ``"both"``, ``"attention"`` or ``"mlp"``: which kind is pruned. `sparsity` counts both kinds always.
        allocation: ``"global"`` ranks units of all layers together; ``"uniform"`` gives every layer equal counts, so
            that the result is a stock checkpoint.
        max_widths: at most so many distinct pairs (KV groups, neurons) over all layers, at the same sparsity and with
            the least saliency lost; None for no limit. For decoders.
        tensor_parallel: kept KV groups and neurons of every block are multiples of this number of devices.

    Returns:
        A plan. Ties are broken by position: the unit that stands first in the model goes first. Its settings hold
        ``kept_saliency``: the fraction of all saliency that stays, and what it were without each restriction asked for.

    Raises:
        NirvanaError: an argument is out of range, scores are missing, misshapen or not finite, or no widths are what
            was asked for.
    """
    rule = WidthRule(sparsity, gamma, rounding, align, scope, allocation, max_widths, tensor_parallel)
    architecture = describe(model)
    table = checked_scores(scores, architecture)
    kept, held = keep_units(rule, architecture, table)
    settings = {**asdict(rule), "kept_saliency": held, **getattr(scores, "settings", {})}
    return make_plan(architecture, kept, settings)


def checked_scores(scores: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """Block name -> fp32 ``[units]`` on the CPU; raises NirvanaError unless they fit the model and are finite."""
    return {block.name: _check_scores(scores, block) for block in architecture.blocks}


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
