"""Copy of the kept units of many matrices, bit by bit: elements move as integers, whatever their type.

Rows, and columns in units, move as the widest integers that their addresses allow. All matrices of one integer width
go in one launch, whatever their shapes.
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

_INTEGERS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}


@triton.jit(do_not_specialize=["entries"])
def _gather_kernel(
    table_ptr,
    kept_ptr,
    entries,
    AXIS: tl.constexpr,
    INTEGER: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    SEARCH: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    entry = table_ptr + locate(table_ptr, entries, program, SEARCH)
    # The columns of `_Copy`, in its order.
    block = program - tl.load(entry)
    source = tl.load(entry + entries).to(tl.pointer_type(INTEGER))
    target = tl.load(entry + 2 * entries).to(tl.pointer_type(INTEGER))
    stride = tl.load(entry + 3 * entries)
    rows = tl.load(entry + 4 * entries)
    columns = tl.load(entry + 5 * entries)
    unit = tl.load(entry + 6 * entries)
    if ALIGNED:
        target = tl.multiple_of(target, 16)
        columns = tl.multiple_of(columns, 16)
        if AXIS == 0:
            source = tl.multiple_of(source, 16)
            stride = tl.multiple_of(stride, 16)

    across = tl.cdiv(columns, BLOCK_COLUMNS)
    row = (block // across) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = (block % across) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    if AXIS == 0:
        from_row = tl.load(kept_ptr + row // unit, mask=row < rows, other=0) * unit + row % unit
        from_column = column
    else:
        from_row = row
        from_column = tl.load(kept_ptr + column // unit, mask=column < columns, other=0) * unit + column % unit
    elements = tl.load(source + from_row[:, None] * stride + from_column[None, :], mask=mask)
    tl.store(target + row[:, None] * columns + column[None, :], elements, mask=mask)


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
        aligned = out.data_ptr() % 16 == 0 and out.shape[1] * size // width % 16 == 0
        if axis == 0:
            aligned = aligned and weight.data_ptr() % 16 == 0 and stride // width % 16 == 0
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
        programs[width, aligned] += triton.cdiv(copy.rows, config.block_rows) * triton.cdiv(
            copy.columns, config.block_columns
        )
    with on(kept.device):
        for (width, aligned), of_launch in copies.items():
            config = GatherConfig.of(width)
            table = Table()
            table.add(of_launch)
            _gather_kernel[(programs[width, aligned],)](
                table.to(kept.device),
                kept,
                len(of_launch),
                AXIS=axis,
                INTEGER=_INTEGERS[width],
                ALIGNED=aligned,
                BLOCK_ROWS=config.block_rows,
                BLOCK_COLUMNS=config.block_columns,
                SEARCH=SEARCH,
                num_warps=config.num_warps,
                enable_fp_fusion=False,  # Triton 3.9 warns where it is left open
            )
