"""Copy of the kept units of many matrices, bit by bit: elements move as integers, whatever their type.

Rows, and columns in units, move as the widest integers that their addresses allow. All matrices of one integer width
go in one launch, whatever their shapes; a single one needs no table of them.
"""

# ruff: noqa: N803 - compile-time arguments are upper case, as everywhere in Triton

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from nirvana.kernels.config import GatherConfig
from nirvana.kernels.table import SEARCH, Table, locate, on

#: Rows and columns of a result from which its indices are of 64 bits: those of its last block must not overflow.
_LARGE = 2**30

_INTEGERS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}


@triton.jit
def _copy(
    block,
    source,
    target,
    stride,
    rows,
    columns,
    unit,
    kept_ptr,
    AXIS: tl.constexpr,
    INTEGER: tl.constexpr,
    INDEX: tl.constexpr,
    ALIGNED: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Copy one block of the matrix that the columns of `_Copy` describe; SINGLE: units are single rows or columns."""
    source = source.to(tl.pointer_type(INTEGER))
    target = target.to(tl.pointer_type(INTEGER))
    if ALIGNED:
        source = tl.multiple_of(source, 16)
        target = tl.multiple_of(target, 16)
        # What they are already: a hint that outlives the inlining of this function.
        stride = stride // 16 * 16
        columns = columns // 16 * 16
    # Divisions of 64-bit integers are subroutines.
    rows, columns, unit = rows.to(INDEX), columns.to(INDEX), unit.to(INDEX)
    if SINGLE:
        unit = 1

    across = tl.cdiv(columns, BLOCK_COLUMNS)
    block = block.to(INDEX)
    # Below the last row it is copied again: a mask of rows and columns would cost more than all the rest.
    row = tl.minimum((block // across) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS), rows - 1)
    column = (block % across) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = (column < columns)[None, :]
    if AXIS == 0:
        from_row = tl.load(kept_ptr + row // unit) * unit + row % unit
        from_column = column
    else:
        from_row = row.to(tl.int64)
        from_column = tl.load(kept_ptr + column // unit, mask=column < columns, other=0) * unit + column % unit
    elements = tl.load(source + from_row[:, None] * stride + from_column[None, :], mask=mask)
    tl.store(target + row.to(tl.int64)[:, None] * columns + column[None, :], elements, mask=mask)


@triton.jit(do_not_specialize=["source", "target", "stride", "rows", "columns", "unit"])
def _gather_kernel(
    source,
    target,
    stride,
    rows,
    columns,
    unit,
    kept_ptr,
    AXIS: tl.constexpr,
    INTEGER: tl.constexpr,
    INDEX: tl.constexpr,
    ALIGNED: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """One matrix, whose description travels with the launch: no copy to the device, which a captured graph would not
    repeat."""
    block = tl.program_id(0)
    _copy(
        block,
        source,
        target,
        stride,
        rows,
        columns,
        unit,
        kept_ptr,
        AXIS,
        INTEGER,
        INDEX,
        ALIGNED,
        SINGLE,
        BLOCK_ROWS,
        BLOCK_COLUMNS,
    )


@triton.jit(do_not_specialize=["entries"])
def _gather_table_kernel(
    table_ptr,
    entries,
    kept_ptr,
    AXIS: tl.constexpr,
    INTEGER: tl.constexpr,
    INDEX: tl.constexpr,
    ALIGNED: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    SEARCH: tl.constexpr,
):
    """Many matrices: a program finds its own in a table, whose columns are those of `_Copy` in their order."""
    program = tl.program_id(0).to(tl.int64)
    entry = table_ptr + locate(table_ptr, entries, program, SEARCH)
    block = program - tl.load(entry)
    source = tl.load(entry + entries)
    target = tl.load(entry + 2 * entries)
    stride = tl.load(entry + 3 * entries)
    rows = tl.load(entry + 4 * entries)
    columns = tl.load(entry + 5 * entries)
    unit = tl.load(entry + 6 * entries)
    _copy(
        block,
        source,
        target,
        stride,
        rows,
        columns,
        unit,
        kept_ptr,
        AXIS,
        INTEGER,
        INDEX,
        ALIGNED,
        SINGLE,
        BLOCK_ROWS,
        BLOCK_COLUMNS,
    )


class _Copy(NamedTuple):
    """A row of the table: one matrix, counted in integers. `source` and `target` are addresses."""

    first_program: int
    source: int
    target: int
    stride: int
    rows: int  # of the result
    columns: int  # of the result
    unit: int


def gather(weights: Sequence[Tensor], kept: Tensor, axis: int, unit: int, outs: Sequence[Tensor]) -> None:
    """Write the units `kept` (int64 ``[units]``) of each matrix to its contiguous out.

    Args:
        weights: ``[rows, columns]`` of any element type, the last dimension contiguous.
        axis: 0 to keep rows, 1 to keep columns.
        unit: rows or columns per unit.
        outs: ``[units * unit, columns]`` or ``[rows, units * unit]``, of the types of the weights.
    """
    copies: dict[tuple[int, bool], list[_Copy]] = defaultdict(list)
    programs: dict[tuple[int, bool], int] = defaultdict(int)
    for weight, out in zip(weights, outs, strict=True):
        size = weight.element_size()
        stride = weight.stride(0) * size if len(weight) > 1 else 0
        # A run of bytes that stays together: a row, or the columns of a unit.
        run = weight.shape[1] * size if axis == 0 else unit * size
        together = weight.data_ptr() | out.data_ptr() | stride | run | out.shape[1] * size
        width = min(together & -together, 8)
        # Rows move 128 bits at a time. Columns do not: neighbours in the result lie apart in the source, and a thread
        # that wrote 16 bytes of them would read where no other of its warp does, 32 sectors a load instead of 4.
        addresses = weight.data_ptr() | out.data_ptr()
        integers = (stride | out.shape[1] * size) // width
        aligned = axis == 0 and addresses % 16 == 0 and integers % 16 == 0
        config = GatherConfig.of(width)
        copy = _Copy(
            programs[width, aligned],
            weight.data_ptr(),
            out.data_ptr(),
            stride // width,
            out.shape[0],
            out.shape[1] * size // width,
            unit if axis == 0 else run // width,
        )
        copies[width, aligned].append(copy)
        programs[width, aligned] += -(-copy.rows // config.block_rows) * -(-copy.columns // config.block_columns)
    with on(kept.device):
        for (width, aligned), of_launch in copies.items():
            config = GatherConfig.of(width)
            options = {
                "AXIS": axis,
                "INTEGER": _INTEGERS[width],
                "INDEX": tl.int32 if all(max(one.rows, one.columns) < _LARGE for one in of_launch) else tl.int64,
                "ALIGNED": aligned,
                "SINGLE": all(one.unit == 1 for one in of_launch),
                "BLOCK_ROWS": config.block_rows,
                "BLOCK_COLUMNS": config.block_columns,
                "num_warps": config.num_warps,
                "enable_fp_fusion": False,  # Triton 3.9 warns where it is left open
            }
            grid = (programs[width, aligned],)
            if len(of_launch) == 1:
                _gather_kernel[grid](*of_launch[0][1:], kept, **options)
            else:
                table = Table()
                table.add(of_launch)
                _gather_table_kernel[grid](table.to(kept.device), len(of_launch), kept, SEARCH=SEARCH, **options)
