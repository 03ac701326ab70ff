"""Launch configurations: frozen, chosen by arithmetic from shapes and types, never tuned.

Block sizes and warps fix the order in which a kernel adds, so they are part of its numerics: they must not depend on
the machine, on free memory, on a timing, or on what else is in the launch.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

#: Blocks below which a reduction is cut finer: about four for each of the 132 multiprocessors of an H100 or H200.
FILLING = 512


@dataclass(frozen=True)
class SaliencyConfig:
    """Blocks of the first pass of `saliency`: a program adds up to `steps` blocks elementwise, then reduces one.

    Attributes:
        block_rows: rows of a block.
        block_columns: columns of a block: 512 bytes of each row in bf16, one warp.
        row_steps: most blocks of a program that sums over rows.
        column_steps: most blocks of a program that sums over columns.
        num_warps: warps of a program.
        num_stages: blocks that are loaded ahead through shared memory, and one; 1 loads one ahead to registers.
    """

    block_rows: int
    block_columns: int
    row_steps: int
    column_steps: int
    num_warps: int
    num_stages: int

    @classmethod
    @functools.cache
    def of(cls, statistics: int) -> SaliencyConfig:
        """Configuration for a number of statistics.

        Each statistic has a block of accumulators in registers: 32 a thread for 16 rows and 4 warps. Up to two leave
        room for the loads of a block, all of which are issued before the first is used (early loads in RESOURCES.md):
        for one statistic of bf16 on sm_90 8 of 16 bytes a thread, 78 registers, 6 programs on a multiprocessor, 96 KiB
        in flight; in a table 128 registers, 4 programs, 64 KiB. Six do not leave that room: their block is half as
        high, and three blocks are loaded ahead through shared memory.

        A sum over rows leaves `block_columns` partial sums a program and statistic, which are written and read once:
        1.6 % of the traffic for one statistic in bf16, 4.7 % for six.
        """
        if statistics <= 2:
            return cls(block_rows=16, block_columns=256, row_steps=8, column_steps=4, num_warps=4, num_stages=1)
        return cls(block_rows=8, block_columns=256, row_steps=32, column_steps=8, num_warps=4, num_stages=4)

    def span(self, rows: int, columns: int, axis: int) -> tuple[int, int]:
        """Rows and columns that one program sums: the most steps that still fill the machine with this matrix alone."""
        steps = self.row_steps if axis else self.column_steps
        blocks = -(-rows // self.block_rows) * -(-columns // self.block_columns)
        while steps > 1 and blocks < FILLING * steps:
            steps //= 2
        return (self.block_rows * steps, self.block_columns) if axis else (self.block_rows, self.block_columns * steps)

    def levels(self, axis: int, group: int) -> int:
        """Of a group's rows or columns 2**levels are one partial sum: the most that no tile and no group cuts."""
        block = self.block_columns if axis else self.block_rows
        return (min(group & -group, block)).bit_length() - 1


@dataclass(frozen=True)
class TotalsConfig:
    """Blocks of the second pass of `saliency`: `block_splits` partial sums of `block_units` units at a time."""

    block_splits: int = 32
    block_units: int = 64
    num_warps: int = 4


@dataclass(frozen=True)
class GatherConfig:
    """Blocks of `gather`.

    Attributes:
        block_rows, block_columns: elements of a block, each of `width` bytes.
        width: bytes of the integers that are moved: 1, 2, 4 or 8.
        num_warps: warps of a program.
    """

    block_rows: int
    block_columns: int
    width: int
    num_warps: int = 4

    @classmethod
    def of(cls, width: int) -> GatherConfig:
        """Blocks of 16 KiB, or of 32 elements a thread where they are small: more rows, less a column.

        Columns of 2 bytes: 16 rows take 411 instructions and 52 registers a thread, which leaves nine programs a
        multiprocessor with 72 KiB of loads in flight; 32 rows take 689 and 164, three programs with 48 KiB (sm_90).
        """
        return cls(block_rows=min(64 // width, 16), block_columns=256, width=width)


@dataclass(frozen=True)
class DivergenceConfig:
    """Blocks of `divergence`: `lanes` online softmaxes side by side, each of which takes `block` words a step.

    A lane's words are one 128-bit load in bf16. Each lane has its own maximum, so the loop has no exchange between
    threads, and needs two exponentials a word and two more a step. With one lane a thread the state takes so few
    registers (sm_90: 40 to 64) that four to six programs share a multiprocessor.

    Attributes:
        least_tokens: tokens from which each is one program's: two for each of the 132 multiprocessors of an H100.
        most_parts: of a token's vocabulary, below.
        least_steps: of a part, so that its loads still overlap.
    """

    lanes: int = 256
    block: int = 8
    num_warps: int = 8
    num_stages: int = 3
    least_tokens: int = 264
    most_parts: int = 64
    least_steps: int = 2

    def span(self, tokens: int, vocabulary: int) -> int:
        """Words of a program, whole steps: all of them from `least_tokens` on, else what makes `FILLING` programs."""
        steps = -(-vocabulary // (self.lanes * self.block))
        if tokens < self.least_tokens:
            parts = min(-(-FILLING // tokens), self.most_parts, steps // self.least_steps)
            steps = -(-steps // max(parts, 1))
        return steps * self.lanes * self.block


@dataclass(frozen=True)
class MixtureConfig:
    """Blocks of `mixture`: a program takes a row, a thread one score a step.

    Attributes:
        block: scores of a step.
        terms: steps that a lane adds in fp32 before it widens.
        num_warps: warps of a program. Short rows take one, which adds its lanes up without a barrier. Not above 8,
            because each thread holds 3 K + 1 sums twice, in fp32 and fp64: up to 167 registers for 8 components.
    """

    block: int
    terms: int
    num_warps: int

    @classmethod
    def of(cls, length: int) -> MixtureConfig:
        warps = 1 if length <= 4096 else 8
        return cls(block=32 * warps, terms=32, num_warps=warps)
