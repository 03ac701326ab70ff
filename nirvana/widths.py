"""How wide each block becomes: the arguments of `allocate` and the scores -> kept units per block."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from nirvana.errors import NirvanaError
from nirvana.gammas import attention_kinds, check_gamma
from nirvana.quantise import quantise
from nirvana.rates import Rates, split_by_kind, split_sparsity
from nirvana.removal import Removal

SCOPES = ("both", "attention", "mlp")
ROUNDINGS = ("budget", "up")
ALLOCATIONS = ("global", "uniform")

#: Kept groups per attention block and kept neurons per MLP, in model order.
Widths = tuple[list[int], list[int]]

#: Attention blocks that are ranked together, and the fraction of their units that goes.
Share = tuple[Removal, float]


@dataclass(frozen=True)
class WidthRule:
    """The arguments of `allocate` that decide how wide blocks become.

    Raises:
        NirvanaError: one is out of range.
    """

    sparsity: float
    gamma: float | Mapping[str, float] = 3.36
    rounding: str = "budget"
    align: int = 8
    scope: str = "both"
    allocation: str = "global"
    max_widths: int | None = None
    tensor_parallel: int = 1

    def __post_init__(self):
        if not 0 < self.sparsity < 1:  # False for nan as well
            raise NirvanaError(f"--sparsity {self.sparsity} must be above 0 and below 1, e.g. 0.2 to remove 20 %")
        if isinstance(self.gamma, str):
            raise NirvanaError(
                f"--gamma {self.gamma} needs the model's weights: prune and select search it; give a number here"
            )
        object.__setattr__(self, "gamma", check_gamma(self.gamma))
        if self.align < 1:
            raise NirvanaError(f"--align {self.align} must be at least 1; 8 suits tensor cores")
        if self.max_widths is not None and self.max_widths < 1:
            raise NirvanaError(f"--max-widths {self.max_widths} must be at least 1; 8 suits torch.compile")
        if self.tensor_parallel < 1:
            raise NirvanaError(f"--tensor-parallel {self.tensor_parallel} must be at least 1, the number of devices")
        for name, allowed in (("rounding", ROUNDINGS), ("scope", SCOPES), ("allocation", ALLOCATIONS)):
            if getattr(self, name) not in allowed:
                raise NirvanaError(f"--{name} {getattr(self, name)!r} must be one of {', '.join(allowed)}")
        if isinstance(self.gamma, Mapping) and self.allocation != "global":
            raise NirvanaError(f"--gamma per kind gives unequal layers: not with --allocation {self.allocation}")


def choose_widths(rule: WidthRule, attention: Removal, mlp: Removal) -> Widths:
    """Widths of all blocks.

    Raises:
        NirvanaError: the scope is too small for the sparsity, or no widths are what `rule` asks for.
    """
    for kind, name in ((attention, "attention"), (mlp, "mlp")):
        kind.check_divisible(pruned=rule.scope in ("both", name))
    target = rule.sparsity * (attention.parameters + mlp.parameters)
    shares, rates = _shares(rule, attention, mlp)
    if rule.allocation == "uniform":
        groups, neurons = _uniform(rule, attention, mlp, rates, target)
        if rule.max_widths is not None and len(set(zip(groups, neurons))) > rule.max_widths:  # noqa: B905 (T5)
            raise NirvanaError("--max-widths: the layers are unequal already; use --allocation global")
        return groups, neurons
    groups, neurons = _global(rule, attention, mlp, shares, rates.mlp, target)
    if rule.max_widths is None or len(set(zip(groups, neurons))) <= rule.max_widths:  # noqa: B905 (T5)
        return groups, neurons
    if rule.rounding == "up":  # which removes less than asked
        target = attention.removed(groups) + mlp.removed(neurons)
    return quantise(attention, mlp, groups, target, rule.align, rule.max_widths, rule.scope)


def _shares(rule: WidthRule, attention: Removal, mlp: Removal) -> tuple[list[Share], Rates]:
    """What is ranked together in attention, each with its rate: all of it, or with gamma per kind each kind."""
    if not isinstance(rule.gamma, Mapping):
        rates = split_sparsity(attention.parameters, mlp.parameters, rule.sparsity, rule.gamma, rule.scope)
        return [(attention, rates.attention)], rates
    kinds = attention_kinds(attention)
    # Of both kinds or of one, as the scope says; this is what refuses a scope that is too small.
    rates = split_sparsity(attention.parameters, mlp.parameters, rule.sparsity, 1.0, rule.scope)
    sizes = {name: kind.parameters for name, kind in kinds.items() if rule.scope != "mlp"}
    sizes |= {"mlp": mlp.parameters} if rule.scope != "attention" else {}
    split = split_by_kind(sizes, rule.gamma, rule.sparsity * (attention.parameters + mlp.parameters))
    shares = [(kind, split.get(name, 0.0)) for name, kind in kinds.items()]
    return shares, Rates(rates.attention, split.get("mlp", 0.0))


def _global(
    rule: WidthRule, attention: Removal, mlp: Removal, shares: Sequence[Share], rate_mlp: float, target: float
) -> Widths:
    """Units of all layers are ranked together."""

    def join(choose: Callable[[Removal, float, int], list[int]], counts: Sequence[int]) -> list[int]:
        widths: dict[str, int] = {}
        for (kind, rate), count in zip(shares, counts, strict=True):
            widths |= zip((block.name for block in kind.blocks), choose(kind, rate, count), strict=True)
        return [widths[block.name] for block in attention.blocks]

    def lowest(kind: Removal, rate: float, count: int) -> list[int]:
        return kind.lowest(count)

    def lowest_aligned(kind: Removal, rate: float, count: int) -> list[int]:
        return kind.lowest_aligned(count, 1)

    def nearest(kind: Removal, rate: float, count: int) -> list[int]:
        return kind.nearest(rate * kind.parameters, 1)

    # The counts are whole units below the rate, as published; the guard absorbs a product landing at 34.999...
    counts = [math.floor(rate * kind.units + 1e-9) for kind, rate in shares]
    if rule.rounding == "up":
        # As published: a unit that is spared is not made up for by another.
        neurons = math.floor(rate_mlp * mlp.units + 1e-9)
        groups = attention.sizes if rule.scope == "mlp" else join(lowest_aligned, counts)
        return groups, mlp.sizes if rule.scope == "attention" else mlp.lowest_aligned(neurons, rule.align)
    if rule.scope == "mlp":
        return attention.sizes, mlp.nearest(target, rule.align)
    groups = join(nearest if attention.divisor > 1 else lowest, counts)
    if rule.scope == "attention":
        # Whole groups are coarse: take one more, of the kind that lost most to rounding, where that is nearer.
        choices = [groups]
        lost = [rate * kind.units - count for (kind, rate), count in zip(shares, counts, strict=True)]
        for kind in sorted(range(len(lost)), key=lambda kind: -lost[kind]) if attention.divisor == 1 else ():
            counts[kind] += 1
            choices.append(join(lowest, counts))
        return min(choices, key=lambda widths: abs(attention.removed(widths) - target)), mlp.sizes
    # The MLP cannot give everything (each block keeps `align` neurons): attention then gives the rest.
    reachable = mlp.removed(mlp.lowest_aligned(mlp.units, rule.align))
    while attention.removed(groups) + reachable < target:
        left = [index for index, (kind, _) in enumerate(shares) if counts[index] < kind.units]
        if not left:
            break
        # The kind that is least far on its way.
        counts[min(left, key=lambda index: counts[index] / (shares[index][1] * shares[index][0].units))] += 1
        groups = join(lowest_aligned if attention.divisor > 1 else lowest, counts)
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
