"""At most N distinct pairs (KV groups, neurons) over all layers, at the same sparsity, with little saliency lost.

Each layer has a price list for either kind: the saliency that goes when it keeps w units, the lowest-scoring ones
first, plus a price for every parameter that stays. At the price at which the unrestricted plan is the cheapest, that
plan is what every layer chooses for itself; N pairs mean N groups of layers that choose together. Finding the groups is
a k-medians problem. It is solved by merging the two groups that lose least until N are left, then by moving single
layers while that helps. At last the price is forgotten and the widths of the groups are chosen exactly, by dynamic
programming over the parameters that stay, so that the budget is met.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from nirvana.errors import NirvanaError
from nirvana.removal import Removal

#: The budget may be missed by this fraction of it where that keeps more saliency, as `--rounding budget` promises.
TOLERANCE = 0.001
#: Each round groups the layers again, at the price at which the last groups met the budget.
ROUNDS = 6
#: Widths on either side of the cheapest one that the last step considers for each group.
WINDOW = 64

Groups = list[list[int]]


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
    heads = PriceList(attention, 1, pruned=scope != "mlp")
    neurons = PriceList(mlp, align, pruned=scope != "attention")
    stay = attention.parameters - attention.removed(widths)
    rest = attention.parameters + mlp.parameters - target
    tolerance = TOLERANCE * target

    groups = [[layer] for layer in range(len(mlp.blocks))]
    best: tuple[tuple[float, float], list[int], list[int]] | None = None
    for _ in range(ROUNDS):
        price_heads = heads.price(groups, stay)
        a = heads.cheapest(groups, price_heads)
        price_neurons = neurons.price(groups, rest - heads.parameters(groups, a))
        if len(groups) > limit:
            groups = _merge(groups, limit, heads.at(price_heads), neurons.at(price_neurons))
        groups = _move(groups, heads.at(price_heads), neurons.at(price_neurons))
        if scope == "attention":
            b = neurons.cheapest(groups, price_neurons)
            a = heads.fill(groups, price_heads, rest - neurons.parameters(groups, b), tolerance)
        else:
            a = heads.cheapest(groups, heads.price(groups, stay))
            b = neurons.fill(groups, price_neurons, rest - heads.parameters(groups, a), tolerance)
        missed = abs(heads.parameters(groups, a) + neurons.parameters(groups, b) - rest)
        quality = (max(missed, tolerance), heads.loss(groups, a) + neurons.loss(groups, b))
        if best is not None and quality >= best[0]:
            break
        best = quality, heads.spread(groups, a), neurons.spread(groups, b)
    return best[1], best[2]


class PriceList:
    """Of one kind: what each layer loses at each width. Infinite where the layer cannot have that width."""

    def __init__(self, kind: Removal, align: int, pruned: bool):
        choices = [kind.options(size, align) if pruned else [size] for size in kind.sizes]
        self.widths = np.array(sorted(set().union(*choices)))
        self.per_unit = np.array([block.parameters_per_unit for block in kind.blocks], dtype=float)
        self.lost = np.full((len(choices), len(self.widths)), np.inf)
        for layer, (block, own) in enumerate(zip(kind.blocks, choices, strict=True)):
            scores = np.sort(kind.scores[block.name].double().numpy())
            lowest = np.concatenate([[0.0], np.cumsum(scores)])
            places = np.searchsorted(self.widths, own)
            self.lost[layer, places] = lowest[block.size - np.array(own)]
        # The steepest way down there is: at this price per parameter nobody keeps anything that can go.
        self.highest = float(np.nanmax(np.abs(np.where(np.isinf(self.lost), np.nan, self.lost)))) + 1.0

    def at(self, price: float) -> np.ndarray:
        """Loss plus price, ``[layers, widths]``."""
        return self.lost + price * self.per_unit[:, None] * self.widths

    def cheapest(self, groups: Groups, price: float) -> list[int]:
        """Index of the width of each group."""
        costs = self.at(price)
        return [int(np.argmin(costs[group].sum(axis=0))) for group in groups]

    def parameters(self, groups: Groups, chosen: Sequence[int]) -> float:
        """Parameters that stay."""
        return sum(self.per_unit[group].sum() * self.widths[index] for group, index in zip(groups, chosen, strict=True))

    def loss(self, groups: Groups, chosen: Sequence[int]) -> float:
        return sum(self.lost[group, index].sum() for group, index in zip(groups, chosen, strict=True))

    def spread(self, groups: Groups, chosen: Sequence[int]) -> list[int]:
        """Width of each layer."""
        widths = np.zeros(len(self.lost), dtype=int)
        for group, index in zip(groups, chosen, strict=True):
            widths[group] = self.widths[index]
        return widths.tolist()

    def price(self, groups: Groups, stay: float) -> float:
        """The price at which the groups keep as near to `stay` parameters as any price makes them."""
        low, high = 0.0, self.highest
        for _ in range(100):  # more parameters stay at the low price
            middle = (low + high) / 2
            if self.parameters(groups, self.cheapest(groups, middle)) > stay:
                low = middle
            else:
                high = middle
        return min((low, high), key=lambda price: abs(self.parameters(groups, self.cheapest(groups, price)) - stay))

    def fill(self, groups: Groups, price: float, stay: float, tolerance: float) -> list[int]:
        """Widths of the groups that keep `stay` parameters to within `tolerance`, or as nearly as any can.

        Of those within the tolerance, the ones that lose least at the price. Exact among the widths near the cheapest.
        """
        start = self.cheapest(groups, self.price(groups, stay))
        columns = [self.at(price)[group].sum(axis=0) for group in groups]
        units = [int(self.per_unit[group].sum()) for group in groups]
        options = []
        for column, at in zip(columns, start, strict=True):
            near = np.arange(max(0, at - WINDOW), min(len(column), at + WINDOW + 1))
            options.append(near[np.isfinite(column[near])])
        # Every sum of parameters is `least` and a multiple of `step`: cost[i] is the cheapest way to least + i * step.
        kept = [unit * self.widths[near] for unit, near in zip(units, options, strict=True)]
        least = sum(int(sizes[0]) for sizes in kept)
        step = np.gcd.reduce(np.concatenate([sizes - sizes[0] for sizes in kept])) or 1
        cost, choices = np.zeros(1), []
        for column, near, sizes in zip(columns, options, kept, strict=True):
            shifts = (sizes - sizes[0]) // step
            longer = np.full(len(cost) + shifts[-1], np.inf)
            choice = np.zeros(len(longer), dtype=int)
            for number, shift in enumerate(shifts):
                there = slice(shift, shift + len(cost))
                value = cost + column[near[number]]
                better = value < longer[there]
                longer[there][better] = value[better]
                choice[there][better] = number
            cost = longer
            choices.append(choice)
        missed = np.maximum(np.abs(least + np.arange(len(cost)) * step - stay), tolerance)
        missed[np.isinf(cost)] = np.inf
        at = int(np.lexsort((cost, missed))[0])
        chosen = []
        for choice, near, sizes in zip(choices[::-1], options[::-1], kept[::-1], strict=True):
            chosen.append(int(near[choice[at]]))
            at -= int((sizes[choice[at]] - sizes[0]) // step)
        return chosen[::-1]


def _merge(groups: Groups, limit: int, heads: np.ndarray, neurons: np.ndarray) -> Groups:
    """Join the two groups whose common widths cost least more than their own, until `limit` are left."""
    groups = [list(group) for group in groups]
    columns = [(heads[group].sum(axis=0), neurons[group].sum(axis=0)) for group in groups]
    alone = [a.min() + b.min() for a, b in columns]

    def together(i: int, j: int) -> float:
        return (columns[i][0] + columns[j][0]).min() + (columns[i][1] + columns[j][1]).min() - alone[i] - alone[j]

    dearer = {pair: together(*pair) for pair in combinations(range(len(groups)), 2)}
    while len(groups) - groups.count([]) > limit:
        i, j = min(dearer, key=dearer.__getitem__)
        if not np.isfinite(dearer[i, j]):
            raise NirvanaError(
                f"--max-widths {limit} is impossible: its layers differ so much that no {limit} pairs of widths fit all"
            )
        groups[i] = sorted(groups[i] + groups[j])
        groups[j] = []
        columns[i] = columns[i][0] + columns[j][0], columns[i][1] + columns[j][1]
        alone[i] = columns[i][0].min() + columns[i][1].min()
        for pair in list(dearer):
            if j in pair:
                del dearer[pair]
            elif i in pair:
                dearer[pair] = together(*pair)
    return [group for group in groups if group]


def _move(groups: Groups, heads: np.ndarray, neurons: np.ndarray) -> Groups:
    """Move single layers between the groups while the whole becomes cheaper."""
    groups = [list(group) for group in groups]

    def cost(layers: list[int]) -> float:
        return heads[layers].sum(axis=0).min() + neurons[layers].sum(axis=0).min() if layers else 0.0

    moved = True
    while moved:
        moved = False
        for layer in range(len(heads)):
            home = next(group for group in groups if layer in group)
            if len(home) == 1:
                continue
            left = [other for other in home if other != layer]
            saved = cost(home) - cost(left)
            added = [np.inf if group is home else cost([*group, layer]) - cost(group) for group in groups]
            target = int(np.argmin(added))
            if added[target] < saved * (1 - 1e-12) - 1e-12:
                home.remove(layer)
                groups[target].append(layer)
                moved = True
    return [sorted(group) for group in groups]
