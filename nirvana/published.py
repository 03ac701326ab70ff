"""Saliency + sparsity -> plan, by the rule of the paper that the criterion is from.

For fair comparisons: each criterion as its paper uses it (`nirvana.saliency.kinds.Published`), at the same number of
kept parameters, beside the common rule of `nirvana.allocate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from nirvana.allocation import allocate, checked_scores, make_plan
from nirvana.architectures import Architecture, Block, describe
from nirvana.errors import NirvanaError
from nirvana.plan import PruningPlan
from nirvana.removal import Kept, Removal
from nirvana.retention import keep_units
from nirvana.saliency import Saliency
from nirvana.saliency.criteria import CRITERIA
from nirvana.saliency.kinds import GLOBAL, Published
from nirvana.saliency.layers import layer_of
from nirvana.widths import WidthRule

#: CFSP adds angles up over 128 x 1024 tokens and divides by 1e4; of means over tokens that is a factor.
CFSP_SLOPE = 128 * 1024 / 1e4


def published(criterion: str) -> Published:
    """What the criterion's paper does with its scores; for nirvana's own, random and sums of several: "global"."""
    return CRITERIA[criterion].published if criterion in CRITERIA else GLOBAL


def allocate_as_published(
    saliency: Saliency,
    model: nn.Module | PreTrainedConfig | Architecture,
    *,
    sparsity: float,
    align: int = 8,
    scope: str | None = None,
    gamma: float = 3.36,
) -> PruningPlan:
    """Choose which units stay, as the paper of the saliency's criterion does.

    Args:
        saliency: from `nirvana.score`: its settings say which criterion.
        model: the model, or only its configuration.
        sparsity: fraction of the prunable parameters (attention + MLP matrices) to remove, whatever the scope.
        align: kept MLP widths are multiples of this; 1 is what all papers but CFSP (128, optional) do.
        scope: "both", "attention" or "mlp"; None takes the paper's.
        gamma: for criteria whose rule is "global".

    Returns:
        A plan whose removed parameters are as near to `sparsity` as the rule can come. Every block keeps at least one
        unit, also where a paper would remove a whole block.

    Raises:
        NirvanaError: an argument is out of range, scores do not fit the model, or the rule cannot reach the sparsity.
    """
    rule = published(str(saliency.settings.get("criterion", "")))
    width_rule = WidthRule(sparsity, gamma=gamma, align=align, scope=rule.scope if scope is None else scope)
    architecture = describe(model)
    if rule.allocation == "global":
        return allocate(saliency, architecture, **asdict(width_rule))
    scores = checked_scores(saliency, architecture)
    choose = {"uniform": _uniform, "joint": _joint, "layer-ratios": _layer_ratios}[rule.allocation]
    kept = choose(rule, width_rule, architecture, scores, saliency.settings)
    settings: dict[str, Any] = {"sparsity": sparsity, "align": align, "scope": width_rule.scope}
    return make_plan(
        architecture, kept, {**settings, "allocation": f"published: {rule.allocation}"} | saliency.settings
    )


def _uniform(
    rule: Published, width_rule: WidthRule, architecture: Architecture, scores: Mapping[str, Tensor], settings: Mapping
) -> Kept:
    """The same rate for attention and MLP in every layer, but for first and last layers that stay whole."""
    layers = list(dict.fromkeys(_layer(block) for block in architecture.blocks))
    first, last = (round(share * len(layers)) for share in rule.spared)
    pruned = set(layers[first : len(layers) - last])
    blocks = tuple(block for block in architecture.blocks if _layer(block) in pruned)
    rest = replace(architecture, blocks=blocks)
    rate = width_rule.sparsity * architecture.prunable_parameters / rest.prunable_parameters
    if rate >= 1:
        raise NirvanaError(
            f"--sparsity {width_rule.sparsity} is impossible: the first {first} and the last {last} layers stay whole, "
            f"{1 - width_rule.sparsity / rate:.0%} of the prunable parameters"
        )
    kept = {block.name: tuple(range(block.size)) for block in architecture.blocks}
    return kept | keep_units(replace(width_rule, sparsity=rate, gamma=1.0, allocation="uniform"), rest, scores)[0]


def _joint(
    rule: Published, width_rule: WidthRule, architecture: Architecture, scores: Mapping[str, Tensor], settings: Mapping
) -> Kept:
    """All units of both kinds ranked together; the threshold moves until the removed parameters meet the target."""
    blocks = _in_scope(architecture, width_rule)
    every = Removal(blocks, scores)

    def widths(count: int) -> list[int]:
        gone = torch.bincount(every.ranking[:count], minlength=len(blocks)).tolist()
        return [
            _rounded_up(every, block, block.size - lost, width_rule) for block, lost in zip(blocks, gone, strict=True)
        ]

    target = width_rule.sparsity * architecture.prunable_parameters
    low, high = 0, every.units
    while low < high:
        middle = (low + high) // 2
        if every.removed(widths(middle)) < target:
            low = middle + 1
        else:
            high = middle
    best = _nearest(every, [widths(max(low - 1, 0)), widths(low)], target)
    return _keep(architecture, every, best, target)


def _layer_ratios(
    rule: Published, width_rule: WidthRule, architecture: Architecture, scores: Mapping[str, Tensor], settings: Mapping
) -> Kept:
    """CFSP: layer l keeps (1 - p) sigma_l / mean(sigma), sigma = sigmoid of its centred importance.

    Where that would be 1 or more, deviations from the mean are shrunk to 1/1.05 of what still fits. p is solved for.
    """
    if "layer_importance" not in settings:
        raise NirvanaError("the saliency has no layer_importance in its settings; score one batch with this criterion")
    importance = settings["layer_importance"]
    layers = list(importance)
    values = torch.tensor([importance[layer] for layer in layers], dtype=torch.float64)
    sigma = torch.sigmoid(CFSP_SLOPE * (values - values.mean()))
    blocks = _in_scope(architecture, width_rule)
    every = Removal(blocks, scores)

    def widths(rate: float) -> list[int]:
        ratios = dict(zip(layers, keep_ratios(sigma, rate).tolist(), strict=True))
        return [
            _rounded(every, block, ratios[layer_of(block.name, layers)] * block.size, width_rule) for block in blocks
        ]

    target = width_rule.sparsity * architecture.prunable_parameters
    low, high, tried = 0.0, 1.0, []
    for _ in range(40):
        middle = (low + high) / 2
        tried.append(widths(middle))
        if every.removed(tried[-1]) < target:
            low = middle
        else:
            high = middle
    return _keep(architecture, every, _nearest(every, tried, target), target)


def keep_ratios(sigma: Tensor, rate: float) -> Tensor:
    """Fraction that each layer keeps, float64 ``[layers]``, with mean 1 - `rate`; `sigma` is above 0."""
    mean = sigma.mean()
    excess = float(sigma.max() / mean * (1 - rate))
    if excess >= 1 and sigma.max() > mean:
        room = mean * (1 / (1 - rate) - 1)
        sigma = mean + (sigma - mean) * room / (sigma.max() - mean) / 1.05
    return sigma / mean * (1 - rate)


def _layer(block: Block) -> str:
    """The name up to and with its first number: ``model.layers.0``, ``encoder.block.0``."""
    parts = block.name.split(".")
    return ".".join(parts[: 1 + next(i for i, part in enumerate(parts) if part.isdigit())])


def _in_scope(architecture: Architecture, rule: WidthRule) -> list[Block]:
    kinds = {"both": (True, False), "attention": (True,), "mlp": (False,)}[rule.scope]
    return [block for block in architecture.blocks if block.is_attention in kinds]


def _rounded_up(removal: Removal, block: Block, width: int, rule: WidthRule) -> int:
    return removal.aligned(width, block.size, 1 if block.is_attention else rule.align)


def _rounded(removal: Removal, block: Block, width: float, rule: WidthRule) -> int:
    options = removal.options(block.size, 1 if block.is_attention else rule.align)
    return min(options, key=lambda option: abs(option - width))


def _nearest(removal: Removal, tried: Sequence[list[int]], target: float) -> list[int]:
    return min(tried, key=lambda widths: abs(removal.removed(widths) - target))


def _keep(architecture: Architecture, removal: Removal, widths: Sequence[int], target: float) -> Kept:
    most = removal.removed([1] * len(widths))
    if target > most:
        raise NirvanaError(
            f"--sparsity {target / architecture.prunable_parameters:g} is impossible: the scope holds "
            f"{most / architecture.prunable_parameters:.1%} of the prunable parameters that can go"
        )
    kept = {block.name: tuple(range(block.size)) for block in architecture.blocks}
    return kept | removal.keep(widths)
