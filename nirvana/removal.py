"""Which units go, once it is known how many: global and uniform selection for one kind of unit.

Published rule (``up``): the lowest-scoring units over all layers go, every block keeps one group, and kept MLP widths
are rounded up to a multiple of `align` by sparing the best candidates. One departure: a block about to lose all its
groups keeps its best one, where the published code keeps the last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from nirvana.architectures import Block
from nirvana.errors import NirvanaError

Kept = dict[str, tuple[int, ...]]


class Removal:
    """The blocks of one kind (attention or MLP) with their scores. Widths are kept units per block, in model order.

    With a `divisor` above 1 (tensor parallelism) every width that is handed out is a multiple of it.
    """

    def __init__(self, blocks: Sequence[Block], scores: Mapping[str, Tensor], divisor: int = 1):
        self.blocks = list(blocks)
        self.scores = scores
        self.divisor = divisor
        self.sizes = [block.size for block in self.blocks]
        self.units = sum(self.sizes)
        self.parameters = sum(block.size * block.parameters_per_unit for block in self.blocks)

    @cached_property
    def ranking(self) -> Tensor:
        """Block index of every unit, int64 ``[units]``, lowest score first; ties by position in the model."""
        if not self.blocks:
            return torch.empty(0, dtype=torch.int64)
        owner = torch.repeat_interleave(torch.arange(len(self.blocks)), torch.tensor(self.sizes))
        order = torch.argsort(torch.cat([self.scores[b.name] for b in self.blocks]), stable=True)
        return owner[order]

    def check_divisible(self, pruned: bool) -> None:
        """Raise NirvanaError, naming the block, unless `divisor` can be met; a kind that is not pruned keeps all."""
        for block in self.blocks:
            units = "key/value heads" if block.is_attention else "neurons"
            if block.size < self.divisor:
                raise NirvanaError(
                    f"--tensor-parallel {self.divisor} is impossible: {block.name} has {block.size} {units}"
                )
            if not pruned and block.size % self.divisor:
                raise NirvanaError(
                    f"--tensor-parallel {self.divisor} does not divide the {block.size} {units} of {block.name}, "
                    "which this --scope leaves whole; use --scope both"
                )

    def removed(self, widths: Sequence[int]) -> int:
        """Parameters that go when each block keeps `widths` units."""
        return sum((b.size - width) * b.parameters_per_unit for b, width in zip(self.blocks, widths, strict=True))

    def lowest(self, count: int) -> list[int]:
        """Widths after removing exactly `count` units, the lowest of all blocks, while every block keeps one."""
        widths = list(self.sizes)
        for owner in self.ranking.tolist():
            if count <= 0:
                break
            if widths[owner] > 1:
                widths[owner] -= 1
                count -= 1
        return widths

    def lowest_aligned(self, count: int, align: int) -> list[int]:
        """Widths after removing the `count` lowest units, less those spared so that widths are multiples of `align`."""
        gone = torch.bincount(self.ranking[:count], minlength=len(self.blocks)).tolist()
        return [self.aligned(size - lost, size, align) for size, lost in zip(self.sizes, gone, strict=True)]

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
        """The same width for all blocks; a block that has less keeps what it has (of it, a multiple of `divisor`)."""
        return [min(width, self._most(size)) for size in self.sizes]

    def _most(self, size: int) -> int:
        return size // self.divisor * self.divisor

    def aligned(self, width: int, size: int, align: int) -> int:
        """`width` rounded up to what a block of `size` units may keep: see `options`."""
        step = math.lcm(align, self.divisor)
        return min(self._most(size), max(step, -(-width // step) * step))

    def options(self, size: int, align: int) -> list[int]:
        """Widths that a block of `size` units may have, in order: multiples of `align`, and all that it has."""
        step = math.lcm(align, self.divisor)
        return [*range(step, self._most(size), step), self._most(size)]

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
