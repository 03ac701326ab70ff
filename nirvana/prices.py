"""What layers lose at each width, and what they choose when every parameter that stays has a price."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nirvana.grouping import Groups
from nirvana.removal import Removal

#: Widths on either side of the cheapest one that `PriceList.fill` considers for each group.
WINDOW = 64


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

    def together(self, groups: Groups) -> tuple[np.ndarray, np.ndarray]:
        """What each group loses at each width, ``[groups, widths]``, and its parameters per unit, ``[groups, 1]``."""
        lost = np.stack([self.lost[group].sum(axis=0) for group in groups])
        return lost, np.array([[self.per_unit[group].sum()] for group in groups])

    def cheapest(self, groups: Groups, price: float) -> list[int]:
        """Index of the width of each group."""
        lost, unit = self.together(groups)
        return np.argmin(lost + price * unit * self.widths, axis=1).tolist()

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
        lost, unit = self.together(groups)

        def kept(price: float) -> float:
            return float((unit[:, 0] * self.widths[np.argmin(lost + price * unit * self.widths, axis=1)]).sum())

        low, high = 0.0, self.highest
        while high - low > 1e-12 * high:  # more parameters stay at the low price
            middle = (low + high) / 2
            low, high = (middle, high) if kept(middle) > stay else (low, middle)
        return min((low, high), key=lambda price: abs(kept(price) - stay))

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
