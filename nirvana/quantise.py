"""At most N distinct pairs (KV groups, neurons) over all layers, at the same sparsity, with little saliency lost.

Each layer has a price list for either kind: the saliency that goes when it keeps w units, the lowest-scoring ones
first, plus a price for every parameter that stays. At the price at which the unrestricted plan is the cheapest, that
plan is what every layer chooses for itself; N pairs mean N groups of layers that choose together. Finding the groups is
a k-medians problem. It is solved by merging the two groups that lose least until N are left, then by moving single
layers while that helps, from several starts. At last the price is forgotten and the widths of the groups are chosen
exactly, by dynamic programming over the parameters that stay, so that the budget is met.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nirvana.errors import NirvanaError
from nirvana.grouping import Groups, merge, move, neighbours
from nirvana.prices import PriceList
from nirvana.removal import Removal

#: The budget may be missed by this fraction of it where that keeps more saliency, as `--rounding budget` promises.
TOLERANCE = 0.001
#: The first groups are made at these multiples of the two prices: too dear and too cheap find other groups.
STARTS = ((1.0, 1.0), (0.5, 0.5), (0.5, 2.0), (2.0, 0.5), (2.0, 2.0), (1.0, 0.7), (1.0, 1.4))
#: Each round groups the layers again, at the price at which the last groups met the budget.
ROUNDS = 6


def quantise(
    attention: Removal, mlp: Removal, widths: Sequence[int], target: float, align: int, limit: int, scope: str
) -> tuple[list[int], list[int]]:
    """Widths of all blocks with at most `limit` distinct pairs.

    Args:
        attention, mlp: one block of each kind per layer.
        widths: kept groups per layer of the plan without the limit, which says how much attention gives.
        target: parameters to remove, of both kinds together.
        align: kept MLP widths are multiples of this.
        limit: largest number of distinct pairs.
        scope: a kind that is not pruned keeps all it has.

    Returns:
        Kept groups and kept neurons per layer.

    Raises:
        NirvanaError: layers do not have one attention and one MLP each, or are too different for so few pairs.
    """
    if len(attention.blocks) != len(mlp.blocks):
        raise NirvanaError("--max-widths needs layers of one attention and one MLP; T5 decoders have two attentions")
    search = _Search(attention, mlp, widths, target, align, scope)
    alone = [[layer] for layer in range(len(mlp.blocks))]
    fair = search.prices(alone)
    best = None
    for scales in STARTS:
        prices = fair[0] * scales[0], fair[1] * scales[1]
        groups = merge(alone, limit, *search.costs(prices))
        last = None
        for _ in range(ROUNDS):
            groups = move(groups, *search.costs(prices))
            found = search.choose(groups)
            best = found if best is None or found.quality < best.quality else best
            if last is not None and found.quality >= last.quality:
                break
            last, prices = found, search.prices(groups)
    best = search.repair(best)
    return search.heads.spread(best.groups, best.heads), search.neurons.spread(best.groups, best.neurons)


@dataclass(frozen=True)
class _Found:
    """Groups of layers, their widths, and how good that is: budget missed and saliency lost, less is better."""

    quality: tuple[float, float]
    groups: Groups
    heads: list[int]
    neurons: list[int]


class _Search:
    """The price lists of both kinds, and the budget."""

    def __init__(self, attention: Removal, mlp: Removal, widths: Sequence[int], target: float, align: int, scope: str):
        self.heads = PriceList(attention, 1, pruned=scope != "mlp")
        self.neurons = PriceList(mlp, align, pruned=scope != "attention")
        self.only_heads = scope == "attention"
        self.stay = attention.parameters - attention.removed(widths)
        self.rest = attention.parameters + mlp.parameters - target
        self.tolerance = TOLERANCE * target

    def prices(self, groups: Groups) -> tuple[float, float]:
        """Of heads and of neurons, at which the groups themselves choose what meets the budget."""
        heads = self.heads.price(groups, self.stay)
        kept = self.heads.parameters(groups, self.heads.cheapest(groups, heads))
        return heads, self.neurons.price(groups, self.rest - kept)

    def costs(self, prices: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
        return self.heads.at(prices[0]), self.neurons.at(prices[1])

    def choose(self, groups: Groups) -> _Found:
        """Widths for given groups: attention as near to its share as any price makes it, the MLP for what is left."""
        heads, neurons = self.heads, self.neurons
        price_heads, price_neurons = self.prices(groups)
        if self.only_heads:
            b = neurons.cheapest(groups, price_neurons)
            a = heads.fill(groups, price_heads, self.rest - neurons.parameters(groups, b), self.tolerance)
        else:
            a = heads.cheapest(groups, price_heads)
            b = neurons.fill(groups, price_neurons, self.rest - heads.parameters(groups, a), self.tolerance)
        missed = abs(heads.parameters(groups, a) + neurons.parameters(groups, b) - self.rest)
        quality = (max(missed, self.tolerance), heads.loss(groups, a) + neurons.loss(groups, b))
        return _Found(quality, groups, a, b)

    def repair(self, found: _Found) -> _Found:
        """Groups of other sizes reach other sums: move single layers while the budget is missed and that helps."""
        while found.quality[0] > self.tolerance:
            moved = [self.choose(groups) for groups in neighbours(found.groups) if self._possible(groups)]
            best = min(moved, key=lambda other: other.quality, default=found)
            if best.quality >= found.quality:
                break
            found = best
        return found

    def _possible(self, groups: Groups) -> bool:
        return all(
            np.isfinite(self.heads.lost[group].sum(axis=0)).any()
            and np.isfinite(self.neurons.lost[group].sum(axis=0)).any()
            for group in groups
        )
