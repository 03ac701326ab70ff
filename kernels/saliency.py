"""Sums over groups of rows or columns of many matrices, by any subset of the six statistics, in two launches.

Pass 1 cuts every matrix into fixed tiles and writes partial sums of rows or columns; pass 2 adds those up per unit and
adds the totals to the outputs, entry by entry in the order of the table. A single matrix is a table of one, so a
grouped call has the bits of single calls by construction. No atomics: the order of every sum is fixed.
"""

# ruff: noqa: N803 - compile-time arguments are upper case, as everywhere in Triton

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nirvana.kernels.config import SaliencyConfig, TotalsConfig
from nirvana.kernels.table import SEARCH, Table, locate, on
from nirvana.kernels.tree import sum_columns, sum_rows, sum_vector
from nirvana.ops.saliency import STATISTICS

if TYPE_CHECKING:
    from nirvana.ops.backends import Matrices

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_OF_WEIGHT = sum(bit for name, bit in STATISTICS.items() if name != "ntk")
_OF_GRAD = STATISTICS["taylor"] | STATISTICS["signed"] | STATISTICS["ntk"] | STATISTICS["fisher"]


@triton.jit
def _pointer(address, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    pointer = address.to(tl.pointer_type(TYPE))
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def _store_sums(partial_ptr, sums, axis, row, column, rows, columns):
    if axis == 0:
        tl.store(partial_ptr + row, sum_columns(sums), mask=row < rows)
    else:
        tl.store(partial_ptr + column, sum_rows(sums), mask=column < columns)


@triton.jit(do_not_specialize=["start", "entries"])
def _saliency_tiles_kernel(
    table_ptr,
    partial_ptr,
    start,
    entries,
    MASK: tl.constexpr,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    SEARCH: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    entry = table_ptr + start
    entry += locate(entry, entries, program, SEARCH)
    # The columns of `_Tile`, in its order.
    tile = program - tl.load(entry)
    weight = tl.load(entry + entries)
    grad = tl.load(entry + 2 * entries)
    weight_stride = tl.load(entry + 3 * entries)
    grad_stride = tl.load(entry + 4 * entries)
    rows = tl.load(entry + 5 * entries)
    columns = tl.load(entry + 6 * entries)
    axis = tl.load(entry + 7 * entries)
    row_span = tl.load(entry + 8 * entries)
    column_span = tl.load(entry + 9 * entries)
    partial_ptr += tl.load(entry + 10 * entries)
    if ALIGNED:
        # 16-byte rows of whole vectors: without these hints no load is 128 bits wide.
        weight_stride = tl.multiple_of(weight_stride, 16)
        grad_stride = tl.multiple_of(grad_stride, 16)
        columns = tl.multiple_of(columns, 16)
        column_span = tl.multiple_of(column_span, 16)
    if WEIGHT is not None:
        weight_ptr = _pointer(weight, WEIGHT, ALIGNED)
    if GRAD is not None:
        grad_ptr = _pointer(grad, GRAD, ALIGNED)

    across = tl.cdiv(columns, column_span)
    first_row = (tile // across) * row_span
    first_column = (tile % across) * column_span
    # One of the two spans is a single block.
    steps = tl.cdiv(tl.minimum(row_span, rows - first_row), BLOCK_ROWS)
    steps *= tl.cdiv(tl.minimum(column_span, columns - first_column), BLOCK_COLUMNS)

    taylor = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    signed = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    ntk = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    fisher = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    magnitude = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    squared = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for step in tl.range(steps, num_stages=NUM_STAGES):
        row = first_row + axis * step * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        column = first_column + (1 - axis) * step * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        mask = (row < rows)[:, None] & (column < columns)[None, :]
        # Upcast at the load: the product of two bf16 numbers does not fit bf16.
        if WEIGHT is not None:
            pointers = weight_ptr + row[:, None] * weight_stride + column[None, :]
            w = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        if GRAD is not None:
            pointers = grad_ptr + row[:, None] * grad_stride + column[None, :]
            g = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
        # The bits of `nirvana.ops.saliency.STATISTICS`.
        if MASK & 1:
            taylor += tl.abs(g * w)
        if MASK & 2:
            signed += g * w
        if MASK & 4:
            ntk += tl.abs(g)
        if MASK & 8:
            fisher += (g * w) * (g * w)
        if MASK & 16:
            magnitude += tl.abs(w)
        if MASK & 32:
            squared += w * w

    row = first_row + tl.arange(0, BLOCK_ROWS)
    column = first_column + tl.arange(0, BLOCK_COLUMNS)
    # Partial sums of an entry: [statistics, splits, length], the length being that of the axis that is kept.
    length = tl.where(axis == 0, rows, columns)
    splits = tl.where(axis == 0, across, tl.cdiv(rows, row_span))
    partial_ptr += tl.where(axis == 0, tile % across, tile // across) * length
    if MASK & 1:
        _store_sums(partial_ptr, taylor, axis, row, column, rows, columns)
        partial_ptr += splits * length
    if MASK & 2:
        _store_sums(partial_ptr, signed, axis, row, column, rows, columns)
        partial_ptr += splits * length
    if MASK & 4:
        _store_sums(partial_ptr, ntk, axis, row, column, rows, columns)
        partial_ptr += splits * length
    if MASK & 8:
        _store_sums(partial_ptr, fisher, axis, row, column, rows, columns)
        partial_ptr += splits * length
    if MASK & 16:
        _store_sums(partial_ptr, magnitude, axis, row, column, rows, columns)
        partial_ptr += splits * length
    if MASK & 32:
        _store_sums(partial_ptr, squared, axis, row, column, rows, columns)


@triton.jit
def _sum_of_splits(partial_ptr, splits, length, position, mask, BLOCK_SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """fp64 [BLOCK]: sums over the splits at some positions of the axis that is kept."""
    sums = tl.zeros([BLOCK_SPLITS, BLOCK], tl.float64)
    for start in range(0, splits, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS).to(tl.int64)
        pointers = partial_ptr + split[:, None] * length + position[None, :]
        sums += tl.load(pointers, mask=(split < splits)[:, None] & mask[None, :], other=0.0).to(tl.float64)
    return sum_rows(sums)


@triton.jit
def _add_single(
    out_ptr,
    block,
    units,
    partial_ptr,
    term_ptr,
    first_term,
    last_term,
    terms,
    statistic,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add all terms to a block of units that are one row or column each: a lane a unit."""
    unit = block * BLOCK + tl.arange(0, BLOCK)
    mask = unit < units
    total = tl.load(out_ptr + unit, mask=mask, other=0.0)
    for index in range(first_term, last_term):
        # The columns of `_Term`, in its order.
        term = term_ptr + index
        splits = tl.load(term + terms)
        length = tl.load(term + 2 * terms)
        sums_ptr = partial_ptr + tl.load(term) + statistic * splits * length
        total += _sum_of_splits(sums_ptr, splits, length, unit, mask, BLOCK_SPLITS, BLOCK).to(tl.float32)
    tl.store(out_ptr + unit, total, mask=mask)


@triton.jit
def _add_group(
    out_ptr,
    unit,
    partial_ptr,
    term_ptr,
    first_term,
    last_term,
    terms,
    statistic,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add all terms to one unit. A group of 1 has the bits of `_add_single`: zeros of masked lanes do not round."""
    total = tl.load(out_ptr + unit)
    for index in range(first_term, last_term):
        term = term_ptr + index
        splits = tl.load(term + terms)
        length = tl.load(term + 2 * terms)
        group = tl.load(term + 3 * terms)
        sums_ptr = partial_ptr + tl.load(term) + statistic * splits * length
        sums = tl.zeros([BLOCK], tl.float64)
        for start in range(0, group, BLOCK):
            member = start + tl.arange(0, BLOCK)
            position = unit * group + member
            sums += _sum_of_splits(sums_ptr, splits, length, position, member < group, BLOCK_SPLITS, BLOCK)
        total += sum_vector(sums).to(tl.float32)
    tl.store(out_ptr + unit, total)


@triton.jit(do_not_specialize=["outs_start", "outs", "terms_start", "terms"])
def _saliency_totals_kernel(
    table_ptr,
    partial_ptr,
    outs_start,
    outs,
    terms_start,
    terms,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    SEARCH: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    statistic = tl.program_id(1).to(tl.int64)
    out = table_ptr + outs_start
    out += locate(out, outs, program, SEARCH)
    # The columns of `_Out`, in its order.
    block = program - tl.load(out)
    address = tl.load(out + outs)
    units = tl.load(out + 2 * outs)
    first = tl.load(out + 3 * outs)
    last = tl.load(out + 4 * outs)
    single = tl.load(out + 5 * outs)
    out_ptr = address.to(tl.pointer_type(tl.float32)) + statistic * units
    term_ptr = table_ptr + terms_start
    if single:
        _add_single(
            out_ptr, block, units, partial_ptr, term_ptr, first, last, terms, statistic, BLOCK_SPLITS, BLOCK_UNITS
        )
    else:
        _add_group(out_ptr, block, partial_ptr, term_ptr, first, last, terms, statistic, BLOCK_SPLITS, BLOCK_UNITS)


class _Tile(NamedTuple):
    """A row of a table of pass 1: one matrix. `weight` and `grad` are addresses, 0 where no statistic needs them."""

    first_program: int
    weight: int
    grad: int
    weight_stride: int
    grad_stride: int
    rows: int
    columns: int
    axis: int
    row_span: int
    column_span: int
    partials: int  # where this matrix's partial sums start in the workspace


class _Out(NamedTuple):
    """A row of the table of pass 2: one output, an address, and the range of its terms."""

    first_program: int
    out: int
    units: int
    first_term: int
    last_term: int
    single: bool  # units of all terms are single rows or columns


class _Term(NamedTuple):
    """What one matrix adds to its output: the total of `group` positions of each split."""

    partials: int
    splits: int
    length: int
    group: int


class _Launch(NamedTuple):
    """Matrices that one launch of pass 1 can serve."""

    weight: torch.dtype | None
    grad: torch.dtype | None
    aligned: bool


def saliency(table: Sequence[Matrices], statistics: int) -> None:
    """Add the sums that the bits of `statistics` name to the `out` of each entry (`nirvana.ops.backends.Matrices`).

    Pass 1 is launched once for each pair of types and alignment in the table (commonly once), pass 2 once. The
    workspace is fp32: for each statistic one partial sum per 256 to 1024 elements summed over columns, per 16 to 256
    elements summed over rows.
    """
    device = table[0].out.device
    count = statistics.bit_count()
    config, totals = SaliencyConfig.of(count), TotalsConfig()

    tiles: dict[_Launch, list[_Tile]] = defaultdict(list)
    programs: dict[_Launch, int] = defaultdict(int)
    terms: dict[tuple[int, int], list[_Term]] = defaultdict(list)
    workspace = 0
    for entry in table:
        weight = entry.weight if statistics & _OF_WEIGHT else None
        grad = entry.grad if statistics & _OF_GRAD else None
        rows, columns = entry.weight.shape
        row_span, column_span = config.span(rows, columns, entry.axis)
        down, across = triton.cdiv(rows, row_span), triton.cdiv(columns, column_span)
        length, splits = (columns, down) if entry.axis else (rows, across)
        launch = _Launch(
            None if weight is None else weight.dtype,
            None if grad is None else grad.dtype,
            all(_aligned(matrix) for matrix in (weight, grad) if matrix is not None),
        )
        tiles[launch].append(
            _Tile(
                programs[launch],
                0 if weight is None else weight.data_ptr(),
                0 if grad is None else grad.data_ptr(),
                0 if weight is None else weight.stride(0),
                0 if grad is None else grad.stride(0),
                rows,
                columns,
                entry.axis,
                row_span,
                column_span,
                workspace,
            )
        )
        programs[launch] += down * across
        terms[entry.out.data_ptr(), length // entry.group].append(_Term(workspace, splits, length, entry.group))
        workspace += count * splits * length

    outs: list[_Out] = []
    programs_of_outs = first_term = 0
    for (address, units), of_out in terms.items():
        single = all(term.group == 1 for term in of_out)
        outs.append(_Out(programs_of_outs, address, units, first_term, first_term + len(of_out), single))
        programs_of_outs += triton.cdiv(units, totals.block_units) if single else units
        first_term += len(of_out)

    host = Table()
    starts = {launch: host.add(of_launch) for launch, of_launch in tiles.items()}
    outs_start = host.add(outs)
    terms_start = host.add([term for of_out in terms.values() for term in of_out])
    with on(device):
        table_on_device = host.to(device)
        partials = torch.empty(workspace, dtype=torch.float32, device=device)
        for launch, of_launch in tiles.items():
            _saliency_tiles_kernel[(programs[launch],)](
                table_on_device,
                partials,
                starts[launch],
                len(of_launch),
                MASK=statistics,
                WEIGHT=_TYPES.get(launch.weight),
                GRAD=_TYPES.get(launch.grad),
                ALIGNED=launch.aligned,
                BLOCK_ROWS=config.block_rows,
                BLOCK_COLUMNS=config.block_columns,
                NUM_STAGES=config.num_stages,
                SEARCH=SEARCH,
                num_warps=config.num_warps,
                # Fusing g * w + sum would round once where the product rounds twice: other bits for "signed".
                enable_fp_fusion=False,
            )
        _saliency_totals_kernel[(programs_of_outs, count)](
            table_on_device,
            partials,
            outs_start,
            len(outs),
            terms_start,
            first_term,
            BLOCK_SPLITS=totals.block_splits,
            BLOCK_UNITS=totals.block_units,
            SEARCH=SEARCH,
            num_warps=totals.num_warps,
            enable_fp_fusion=False,
        )


def _aligned(matrix: Tensor) -> bool:
    """Whether each row starts at a multiple of 16 bytes and holds a multiple of 16 elements."""
    stride = matrix.stride(0) if len(matrix) > 1 else 0
    return matrix.data_ptr() % 16 == 0 and stride % 16 == 0 and matrix.shape[1] % 16 == 0
