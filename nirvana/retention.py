"""Which units stay under a rule, how much of the saliency they hold, and what each restriction of the rule costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from nirvana.architectures import Architecture
from nirvana.removal import Kept, Removal
from nirvana.widths import WidthRule, choose_widths

#: Restriction -> the rule without it. They make shapes that more runtimes take, at a price.
UNRESTRICTED: dict[str, dict[str, Any]] = {
    "align": {"align": 1},
    "allocation": {"allocation": "global", "max_widths": None},
    "max_widths": {"max_widths": None},
    "tensor_parallel": {"tensor_parallel": 1},
}


def keep_units(
    rule: WidthRule, architecture: Architecture, scores: Mapping[str, Tensor]
) -> tuple[Kept, dict[str, Any] | None]:
    """Which units stay, what they hold of all saliency, and what would be held without each restriction asked for.

    Returns:
        Block name -> sorted indices of the units that stay; and ``{"fraction": 0.913, "without": {"max_widths": 0.92,
        ...}}``, or None where scores do not sum to above zero.
    """
    blocks = architecture.blocks

    @cache  # the ranking of all units is the same for every rule
    def kinds(divisor: int) -> tuple[Removal, Removal]:
        attention, mlp = [b for b in blocks if b.is_attention], [b for b in blocks if not b.is_attention]
        return Removal(attention, scores, divisor), Removal(mlp, scores, divisor)

    def choose(rule: WidthRule) -> Kept:
        attention, mlp = kinds(rule.tensor_parallel)
        groups, neurons = choose_widths(rule, attention, mlp)
        shared = rule.allocation == "uniform"
        return attention.keep(groups, shared) | mlp.keep(neurons, shared)

    def fraction(kept: Kept) -> float:
        held = sum(float(scores[name][torch.tensor(units)].double().sum()) for name, units in kept.items())
        return round(held / total, 6)

    kept = choose(rule)
    total = sum(float(score.double().sum()) for score in scores.values())
    if total <= 0:
        return kept, None
    asked = [field.name for field in fields(rule) if getattr(rule, field.name) != field.default]
    restrictions = [name for name, free in UNRESTRICTED.items() if name in asked and getattr(rule, name) != free[name]]
    without = {name: fraction(choose(replace(rule, **UNRESTRICTED[name]))) for name in restrictions}
    return kept, {"fraction": fraction(kept), "without": without}


def kept_saliency_line(settings: Mapping[str, Any]) -> str | None:
    """What the restrictions that were asked for cost, in words; None where there are none.

    For example ``kept saliency 91.3 % (92.0 % without --max-widths 8)``.
    """
    measured = settings.get("kept_saliency")
    if not measured or not measured["without"]:
        return None
    prices = [
        f"{100 * value:.1f} % without --{name.replace('_', '-')} {settings[name]}"
        for name, value in measured["without"].items()
    ]
    return f"kept saliency {100 * measured['fraction']:.1f} % ({', '.join(prices)})"
