"""How wide each block becomes: the arguments of `allocate` and the scores -> kept units per block."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nirvana.errors import NirvanaError
from nirvana.quantise import quantise
from nirvana.removal import Removal

SCOPES = ("both", "attention", "mlp")
ROUNDINGS = ("budget", "up")
ALLOCATIONS = ("global", "uniform")

#: Kept groups per attention block and kept neurons per MLP, in model order.
Widths = tuple[list[int], list[int]]


@dataclass(frozen=True)
class WidthRule:
    """The arguments of `allocate` that decide how wide blocks become.

    Raises:
        NirvanaError: one is out of range.
    """

    sparsity: float
    gamma: float = 3.36
    rounding: str = "budget"
    align: int = 8
    scope: str = "both"
    allocation: str = "global"
    max_widths: int | None = None
    tensor_parallel: int = 1

    def __post_init__(self):
        if not 0 < self.sparsity < 1:  # False for nan as well
            raise NirvanaError(f"--sparsity {self.sparsity} must be above 0 and below 1, e.g. 0.2 to remove 20 %")
        if not 0 < self.gamma < math.inf:
            raise NirvanaError(f"--gamma {self.gamma} must be a positive number; the published value is 3.36")
        if self.align < 1:
            raise NirvanaError(f"--align {self.align} must be at least 1; 8 suits tensor cores")
        if self.max_widths is not None and self.max_widths < 1:
            raise NirvanaError(f"--max-widths {self.max_widths} must be at least 1; 8 suits torch.compile")
        if self.tensor_parallel < 1:
            raise NirvanaError(f"--tensor-parallel {self.tensor_parallel} must be at least 1, the number of devices")
        for name, allowed in (("rounding", ROUNDINGS), ("scope", SCOPES), ("allocation", ALLOCATIONS)):
            if getattr(self, name) not in allowed:
                raise NirvanaError(f"--{name} {getattr(self, name)!r} must be one of {', '.join(allowed)}")


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


def choose_widths(rule: WidthRule, attention: Removal, mlp: Removal) -> Widths:
    """Widths of all blocks.

    Raises:
        NirvanaError: the scope is too small for the sparsity, or no widths are what `rule` asks for.
    """
    for kind, name in ((attention, "attention"), (mlp, "mlp")):
        kind.check_divisible(pruned=rule.scope in ("both", name))
    rates = split_sparsity(attention.parameters, mlp.parameters, rule.sparsity, rule.gamma, rule.scope)
    target = rule.sparsity * (attention.parameters + mlp.parameters)
    if rule.allocation == "uniform":
        groups, neurons = _uniform(rule, attention, mlp, rates, target)
        if rule.max_widths is not None and len(set(zip(groups, neurons))) > rule.max_widths:  # noqa: B905 (T5)
            raise NirvanaError("--max-widths: the layers are unequal already; use --allocation global")
        return groups, neurons
    groups, neurons = _global(rule, attention, mlp, rates, target)
    if rule.max_widths is None or len(set(zip(groups, neurons))) <= rule.max_widths:  # noqa: B905 (T5)
        return groups, neurons
    if rule.rounding == "up":  # which removes less than asked
        target = attention.removed(groups) + mlp.removed(neurons)
    return quantise(attention, mlp, groups, target, rule.align, rule.max_widths, rule.scope)


def _global(rule: WidthRule, attention: Removal, mlp: Removal, rates: Rates, target: float) -> Widths:
    """Units of all layers are ranked together."""
    # The counts are whole units below the rate, as published; the guard absorbs a product landing at 34.999...
    count = math.floor(rates.attention * attention.units + 1e-9)
    if rule.rounding == "up":
        # As published: a unit that is spared is not made up for by another.
        neurons = math.floor(rates.mlp * mlp.units + 1e-9)
        groups = attention.sizes if rule.scope == "mlp" else attention.lowest_aligned(count, 1)
        return groups, mlp.sizes if rule.scope == "attention" else mlp.lowest_aligned(neurons, rule.align)
    if rule.scope == "mlp":
        return attention.sizes, mlp.nearest(target, rule.align)
    if attention.divisor > 1:
        groups = attention.nearest(rates.attention * attention.parameters, 1)
    else:
        groups = attention.lowest(count)
    if rule.scope == "attention":
        # Whole groups are coarse: take the neighbour if it lies nearer to the target.
        choices = [groups] if attention.divisor > 1 else [groups, attention.lowest(count + 1)]
        return min(choices, key=lambda widths: abs(attention.removed(widths) - target)), mlp.sizes
    # The MLP cannot give everything (each block keeps `align` neurons): attention then gives the rest.
    reachable = mlp.removed(mlp.lowest_aligned(mlp.units, rule.align))
    while attention.removed(groups) + reachable < target and count < attention.units:
        count += 1
        groups = attention.lowest_aligned(count, 1) if attention.divisor > 1 else attention.lowest(count)
    return groups, mlp.nearest(target - attention.removed(groups), rule.align)


def _uniform(rule: WidthRule, attention: Removal, mlp: Removal, rates: Rates, target: float) -> Widths:
    """Equal counts in every layer."""
    groups, neurons = max(attention.sizes), max(mlp.sizes)
    if rule.rounding == "up":
        left = attention.aligned(groups - math.floor(rates.attention * groups + 1e-9), groups, 1)
        width = mlp.aligned(neurons - math.floor(rates.mlp * neurons + 1e-9), neurons, rule.align)
        return (
            attention.sizes if rule.scope == "mlp" else attention.uniform(left),
            mlp.sizes if rule.scope == "attention" else mlp.uniform(width),
        )
    # A group in every layer is a coarse step: start from the nearest count, give more where the MLP cannot pay.
    step = attention.divisor
    kept = max(step, round((groups - round(rates.attention * groups)) / step) * step)
    counts = [kept, *range(kept - step, 0, -step)]
    narrowest = mlp.sizes if rule.scope == "attention" else mlp.uniform(min(mlp.options(neurons, rule.align)))
    while rule.scope != "mlp" and len(counts) > 1:
        if attention.removed(attention.uniform(counts[0])) + mlp.removed(narrowest) >= target:
            break
        counts.pop(0)
    left = attention.uniform(counts[0])
    if rule.scope == "attention":
        choices = [left, attention.uniform(min(counts[0] + step, groups))]
        return min(choices, key=lambda widths: abs(attention.removed(widths) - target)), mlp.sizes
    if rule.scope == "mlp":
        left = attention.sizes
    rest = target - attention.removed(left)
    choices = [mlp.uniform(width) for width in mlp.options(neurons, rule.align)[::-1]]
    return left, min(choices, key=lambda chosen: abs(mlp.removed(chosen) - rest))
