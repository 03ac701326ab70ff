"""Calibration batches -> saliency -> plan -> repaired weights, at once or in steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nirvana.allocation import allocate
from nirvana.architectures import describe
from nirvana.calibration import CalibrationBatch
from nirvana.calibration.manifest import batch_settings
from nirvana.plan import PruningPlan
from nirvana.progress import Progress
from nirvana.recipe import AUTO, Recipe
from nirvana.repair import repair
from nirvana.repair.strength import choose_strength
from nirvana.repair.weights import OutputWeights
from nirvana.saliency import Saliency, combine, needs_calibration, score
from nirvana.saliency.ntk import ntk_report
from nirvana.selection import Probe, search_gamma, select
from nirvana.slicing import apply
from nirvana.widths import WidthRule


@dataclass(frozen=True)
class Decision:
    """What is cut.

    Attributes:
        saliency: of the last step.
        plan: its settings hold what was searched and found: ``selection``, ``gamma_search``, ``steps``, ``repair``.
        ntk: see `nirvana.saliency.ntk`; None unless asked for.
    """

    saliency: Saliency = field(repr=False)
    plan: PruningPlan
    ntk: dict[str, Any] | None = field(repr=False)


def decide(
    model: PreTrainedModel,
    batches: Sequence[CalibrationBatch],
    probe_tokens: Tensor | None,
    rule: WidthRule,
    recipe: Recipe,
    progress: Progress,
    saliency: Saliency | None = None,
    dense: OutputWeights | None = None,
) -> Decision:
    """Score, choose and plan; where the recipe repairs, `model` has the repaired output layers afterwards.

    With several steps, the sparsity grows by equal parts. Each step scores the smaller model that the one before left,
    repaired; units that are gone stay gone; the repair always starts again from the dense weights.

    Args:
        model: dense; all but its output layers is left as it was found.
        batches: candidates, or batches to combine, or one; empty where the recipe needs no tokens.
        probe_tokens: held out, int64 ``[examples, tokens]``, where the recipe needs a probe.
        rule: how wide blocks become. Where gamma is searched, its gamma is the first that is tried.
        recipe: everything else.
        progress: told how far the work is.
        saliency: of the dense model on these batches, where it has been scored before.
        dense: the output layers as they are now, where the caller holds a copy anyway.
    """
    found: dict[str, Any] = {}
    probe = None if probe_tokens is None else Probe(model, probe_tokens, micro_batch=recipe.micro_batch)
    if recipe.candidates > 1:
        selection = select(model, batches, probe, rule, progress=progress, **recipe.scoring)
        saliency, batches = selection.saliency, [batches[selection.best]]
        found["selection"] = selection.to_dict()
    elif saliency is None:
        saliency = score_batches(model, batches, recipe, progress)
    if recipe.search_gamma:
        search = search_gamma(model, saliency, probe, rule, progress=progress)
        rule = replace(rule, gamma=search.gamma)
        found["gamma_search"] = search.to_dict()["curve"]
    tokens = torch.cat([batch.tokens for batch in batches]) if recipe.repairs else None
    if dense is None and recipe.goes_back:
        dense = OutputWeights(model, describe(model))
    steps = [replace(rule, sparsity=rule.sparsity * step / recipe.steps) for step in range(1, recipe.steps)] + [rule]
    plan = allocate(saliency, model, **asdict(steps[0]))
    for step in steps[1:]:
        _repair(model, plan, tokens, recipe, progress)
        saliency = _spread(score_batches(apply(model, plan), batches, recipe, progress), plan)
        dense.restore()
        plan = allocate(saliency, model, **asdict(step))
    if recipe.steps > 1:
        found["steps"] = recipe.steps
    if recipe.repairs:
        _repair(model, plan, tokens, recipe, progress)
        found["repair"] = {"method": recipe.repair_method, "ridge": recipe.repair_ridge, "strength": 1.0}
        if recipe.repair_strength == AUTO:
            found["repair"]["strength"] = choose_strength(dense.blends(), probe)
        elif recipe.repair_strength != 1:
            dense.blends().set(recipe.repair_strength, recipe.repair_strength)
            found["repair"]["strength"] = recipe.repair_strength
    plan = replace(plan, settings={**plan.settings, **found})
    return Decision(saliency, plan, _ntk(model, plan, probe_tokens, dense, recipe))


def score_batches(
    model: PreTrainedModel, batches: Sequence[CalibrationBatch], recipe: Recipe, progress: Progress
) -> Saliency:
    """Score each batch and combine the scores; the settings say what the batches were made of."""
    reads = needs_calibration(recipe.criterion)
    every = [batch.tokens for batch in batches] if reads else [None]
    scored = sum(part.scored for block in describe(model).blocks for part in block.slices)
    with progress.stage("score", len(every) * scored) as advance:
        saliencies = [score(model, tokens, progress=lambda: advance(1), **recipe.scoring) for tokens in every]
    saliency = saliencies[0] if len(saliencies) == 1 else combine(saliencies, recipe.combine, model)
    if reads:
        saliency.settings |= batch_settings([batch.manifest for batch in batches], recipe.seed)
    return saliency


def _spread(saliency: Saliency, plan: PruningPlan) -> Saliency:
    """Scores of the smaller model as scores of the dense one; units that are gone come last."""
    scores = {}
    for block in plan.blocks:
        scores[block.name] = torch.zeros(block.size)
        # Kept units above zero: a score of 0 must not be taken for one of those that are gone.
        lowest = torch.finfo(torch.float32).tiny
        scores[block.name][list(block.kept)] = saliency[block.name].clamp(min=lowest)
    return Saliency(scores, saliency.settings)


def _repair(
    model: PreTrainedModel, plan: PruningPlan, tokens: Tensor | None, recipe: Recipe, progress: Progress
) -> None:
    with progress.stage("repair", len(plan.blocks)) as advance:
        repair(
            model,
            plan,
            tokens,
            method=recipe.repair_method,
            ridge=recipe.repair_ridge,
            progress=lambda: advance(1),
        )


def _ntk(
    model: PreTrainedModel, plan: PruningPlan, tokens: Tensor | None, dense: OutputWeights | None, recipe: Recipe
) -> dict[str, Any] | None:
    """Of the dense weights: how much of the kernel the kept units hold says nothing of repaired ones."""
    if not recipe.ntk:
        return None
    if dense is None:
        return ntk_report(model, plan, tokens, micro_batch=recipe.micro_batch)
    with dense.restored():
        return ntk_report(model, plan, tokens, micro_batch=recipe.micro_batch)
