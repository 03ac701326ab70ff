"""Which units go, once it is known how many: global and uniform selection for one kind of unit.

Published rule (``up``): the lowest-scoring units over all layers go, every block keeps one group, and kept MLP widths
are rounded up to a multiple of `align` by sparing the best candidates. One departure: a block about to lose all its
groups keeps its best one, where the published code keeps the last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from nirvana.architectures import Block

Kept = dict[str, tuple[int, ...]]


class Removal:
    """The blocks of one kind (attention or MLP) with their scores. Widths are kept units per block, in model order."""

    def __init__(self, blocks: Sequence[Block], scores: Mapping[str, Tensor]):
        self.blocks = list(blocks)
        self.scores = scores
        self.sizes = [block.size for block in self.blocks]
        self.units = sum(self.sizes)
        self.parameters = sum(block.size * block.parameters_per_unit for block in self.blocks)

    @cached_property
    def ranking(self) -> list[int]:
        """Block index of every unit, lowest score first; ties by position in the model."""
        if not self.blocks:
            return []
        owner = torch.repeat_interleave(torch.arange(len(self.blocks)), torch.tensor(self.sizes))
        order = torch.argsort(torch.cat([self.scores[b.name] for b in self.blocks]), stable=True)
        return owner[order].tolist()

    def removed(self, widths: Sequence[int]) -> int:
        """Parameters that go when each block keeps `widths` units."""
        return sum((b.size - width) * b.parameters_per_unit for b, width in zip(self.blocks, widths, strict=True))

    def lowest(self, count: int) -> list[int]:
        """Widths after removing exactly `count` units, the lowest of all blocks, while every block keeps one."""
        widths = list(self.sizes)
        for owner in self.ranking:
            if count <= 0:
                break
            if widths[owner] > 1:
                widths[owner] -= 1
                count -= 1
        return widths

    def lowest_aligned(self, count: int, align: int) -> list[int]:
        """Widths after removing the `count` lowest units, less those spared so that widths are multiples of `align`."""
        gone = [0] * len(self.blocks)
        for owner in self.ranking[:count]:
            gone[owner] += 1
        return [aligned(size - lost, size, align) for size, lost in zip(self.sizes, gone, strict=True)]

    def nearest(self, target: float, align: int) -> list[int]:
        """Aligned widths whose removed parameters come as near to `target` as one moving threshold can."""
        # What is removed grows with the count, so the nearest lies on one of the two sides of the target.
        low, high = 0, self.units
        while low < high:
            middle = (low + high) // 2
            if self.removed(self.lowest_aligned(middle, align)) < target:
                low = middle + 1
            else:
                high = middle
        choices = [self.lowest_aligned(count, align) for count in (max(low - 1, 0), low)]
        return min(choices, key=lambda widths: abs(self.removed(widths) - target))

    def uniform(self, width: int) -> list[int]:
        """The same width for all blocks; a block that has less keeps what it has."""
        return [min(width, size) for size in self.sizes]

    def keep(self, widths: Sequence[int], shared: bool = False) -> Kept:
        """The best units of each block, sorted by index. Of equals the one that stands later stays.

        With `shared`, blocks that must keep the same units (`Block.shares_selection_with`) rank them by summed scores.
        """
        ranks = {block.name: self.scores[block.name] for block in self.blocks}
        if shared:
            sums: dict[str, Tensor] = {}
            for block in self.blocks:
                if label := block.shares_selection_with:
                    sums[label] = sums.get(label, 0) + self.scores[block.name]
            ranks |= {b.name: sums[b.shares_selection_with] for b in self.blocks if b.shares_selection_with}
        kept = {}
        for block, width in zip(self.blocks, widths, strict=True):
            order = torch.argsort(ranks[block.name], stable=True)
            kept[block.name] = tuple(sorted(order[block.size - width :].tolist()))
        return kept


def aligned(width: int, size: int, align: int) -> int:
    """`width` rounded up to a multiple of `align`, at least `align`, at most the `size` that the block has."""
    return min(size, max(align, -(-width // align) * align))
