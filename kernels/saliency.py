"""Sums over groups of rows or columns of many matrices, by any subset of the six statistics, in two launches.

Pass 1 cuts every matrix into fixed tiles and writes partial sums of rows or columns, those of one unit folded as far as
a tile holds them; pass 2 (totals.py) adds those up per unit and adds the totals to the outputs, entry by entry in the
order of the table. A single matrix is a table of one, so a grouped call has the bits of single calls; its table are
the arguments of the kernels. No atomics: the order of every sum is fixed.
"""

# ruff: noqa: N803 - compile-time arguments are upper case, as everywhere in Triton

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nirvana.kernels.config import SaliencyConfig, TotalsConfig
from nirvana.kernels.table import SEARCH, Table, locate, on
from nirvana.kernels.totals import Out, Term, saliency_total_kernel, saliency_totals_kernel
from nirvana.kernels.tree import fold, sum_columns, sum_rows
from nirvana.ops.backends.upload import upload
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
def _load(pointer, stride, row, column, height, width):
    mask = (row < height)[:, None] & (column < width)[None, :]
    # The offset of a row needs 64 bits, whatever the tile.
    return tl.load(pointer + row.to(tl.int64)[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def _store_sums(partial_ptr, sums, axis, height, width, levels):
    # The sum of a position stands at each of its rows or columns; the first one writes.
    inside = (1 << levels) - 1
    if axis == 0:
        row = tl.arange(0, sums.shape[0])
        of_rows = fold(sum_columns(sums), levels)
        tl.store(partial_ptr + (row >> levels), of_rows, mask=(row < height) & ((row & inside) == 0))
    else:
        column = tl.arange(0, sums.shape[1])
        of_columns = fold(sum_rows(sums), levels)
        tl.store(partial_ptr + (column >> levels), of_columns, mask=(column < width) & ((column & inside) == 0))


@triton.jit
def _sum_tile(
    partial_ptr,
    tile,
    weight,
    grad,
    weight_stride,
    grad_stride,
    rows,
    columns,
    axis,
    levels,
    row_span,
    column_span,
    MASK: tl.constexpr,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Write the partial sums of one tile of a matrix. All numbers are int64."""
    if ALIGNED:
        # 16-byte rows of whole vectors: unless the compiler knows it no load is 128 bits wide. `tl.multiple_of` would
        # be lost here: it marks what computes a value, and an argument of a function is computed outside.
        weight_stride = weight_stride // 16 * 16
        grad_stride = grad_stride // 16 * 16
        column_span = column_span // 16 * 16
    across = tl.cdiv(columns, column_span)
    first_row = (tile // across) * row_span
    first_column = (tile % across) * column_span
    if WEIGHT is not None:
        weight_ptr = _pointer(weight, WEIGHT, ALIGNED) + first_row * weight_stride + first_column
    if GRAD is not None:
        grad_ptr = _pointer(grad, GRAD, ALIGNED) + first_row * grad_stride + first_column
    # Inside a tile 32 bits are enough, and take half of the registers.
    height = tl.minimum(row_span, rows - first_row).to(tl.int32)
    width = tl.minimum(column_span, columns - first_column).to(tl.int32)
    if ALIGNED:
        width = width // 16 * 16
    axis = axis.to(tl.int32)
    levels = levels.to(tl.int32)
    # One of the two spans is a single block.
    steps = tl.cdiv(height, BLOCK_ROWS) * tl.cdiv(width, BLOCK_COLUMNS)

    taylor = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    signed = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    ntk = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    fisher = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    magnitude = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    squared = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    row = tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_COLUMNS)
    if NUM_STAGES == 1:
        if WEIGHT is not None:
            next_weight = _load(weight_ptr, weight_stride, row, column, height, width)
        if GRAD is not None:
            next_grad = _load(grad_ptr, grad_stride, row, column, height, width)
    for _ in tl.range(steps, num_stages=NUM_STAGES):
        # Upcast at the load: the product of two bf16 numbers does not fit bf16.
        if NUM_STAGES == 1:
            # One step late, so that all loads of a block are on their way before the first is used: left to itself the
            # compiler uses two of eight before it issues the others. Behind the end of the tile they are masked.
            row += axis * BLOCK_ROWS
            column += (1 - axis) * BLOCK_COLUMNS
            if WEIGHT is not None:
                w = next_weight.to(tl.float32)
                next_weight = _load(weight_ptr, weight_stride, row, column, height, width)
            if GRAD is not None:
                g = next_grad.to(tl.float32)
                next_grad = _load(grad_ptr, grad_stride, row, column, height, width)
        else:
            if WEIGHT is not None:
                w = _load(weight_ptr, weight_stride, row, column, height, width).to(tl.float32)
            if GRAD is not None:
                g = _load(grad_ptr, grad_stride, row, column, height, width).to(tl.float32)
            row += axis * BLOCK_ROWS
            column += (1 - axis) * BLOCK_COLUMNS
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

    # Partial sums of a matrix: [statistics, splits, length]; a position is 2**levels rows or columns of one unit.
    length = tl.where(axis == 0, rows, columns) >> levels
    splits = tl.where(axis == 0, across, tl.cdiv(rows, row_span))
    partial_ptr += tl.where(axis == 0, tile % across, tile // across) * length
    partial_ptr += tl.where(axis == 0, first_row, first_column) >> levels
    if MASK & 1:
        _store_sums(partial_ptr, taylor, axis, height, width, levels)
        partial_ptr += splits * length
    if MASK & 2:
        _store_sums(partial_ptr, signed, axis, height, width, levels)
        partial_ptr += splits * length
    if MASK & 4:
        _store_sums(partial_ptr, ntk, axis, height, width, levels)
        partial_ptr += splits * length
    if MASK & 8:
        _store_sums(partial_ptr, fisher, axis, height, width, levels)
        partial_ptr += splits * length
    if MASK & 16:
        _store_sums(partial_ptr, magnitude, axis, height, width, levels)
        partial_ptr += splits * length
    if MASK & 32:
        _store_sums(partial_ptr, squared, axis, height, width, levels)


@triton.jit(do_not_specialize=["start", "entries"])
def _saliency_tiles_kernel(
    partial_ptr,
    table_ptr,
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
    """A program a tile of each matrix in the table."""
    program = tl.program_id(0).to(tl.int64)
    entry = table_ptr + start
    entry += locate(entry, entries, program, SEARCH)
    # The columns of `_Tiles`, in its order.
    _sum_tile(
        partial_ptr + tl.load(entry + entries),
        program - tl.load(entry),
        tl.load(entry + 2 * entries),
        tl.load(entry + 3 * entries),
        tl.load(entry + 4 * entries),
        tl.load(entry + 5 * entries),
        tl.load(entry + 6 * entries),
        tl.load(entry + 7 * entries),
        tl.load(entry + 8 * entries),
        tl.load(entry + 9 * entries),
        tl.load(entry + 10 * entries),
        tl.load(entry + 11 * entries),
        MASK,
        WEIGHT,
        GRAD,
        ALIGNED,
        BLOCK_ROWS,
        BLOCK_COLUMNS,
        NUM_STAGES,
    )


_OF_ONE = (
    *("weight", "grad", "weight_stride", "grad_stride", "rows", "columns", "axis", "levels", "row_span", "column_span"),
)


@triton.jit(do_not_specialize=_OF_ONE)
def _saliency_tile_kernel(
    partial_ptr,
    weight: tl.int64,
    grad: tl.int64,
    weight_stride: tl.int64,
    grad_stride: tl.int64,
    rows: tl.int64,
    columns: tl.int64,
    axis: tl.int64,
    levels: tl.int64,
    row_span: tl.int64,
    column_span: tl.int64,
    MASK: tl.constexpr,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """`_saliency_tiles_kernel` of one matrix: its numbers are arguments, so there is no table to copy, nor to load."""
    _sum_tile(
        partial_ptr,
        tl.program_id(0).to(tl.int64),
        weight,
        grad,
        weight_stride,
        grad_stride,
        rows,
        columns,
        axis,
        levels,
        row_span,
        column_span,
        MASK,
        WEIGHT,
        GRAD,
        ALIGNED,
        BLOCK_ROWS,
        BLOCK_COLUMNS,
        NUM_STAGES,
    )


class _Tiles(NamedTuple):
    """A row of a table of pass 1: one matrix. `weight` and `grad` are addresses, 0 where no statistic needs them."""

    first_program: int
    partials: int  # where this matrix's partial sums start in the workspace
    weight: int
    grad: int
    weight_stride: int
    grad_stride: int
    rows: int
    columns: int
    axis: int
    levels: int
    row_span: int
    column_span: int


class _Key(NamedTuple):
    """What matrices that one launch of pass 1 serves have in common."""

    weight: torch.dtype | None
    grad: torch.dtype | None
    aligned: bool


class _Launch(NamedTuple):
    """A kernel, its grid, its arguments after the workspace, and its compile-time ones."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def saliency(table: Sequence[Matrices], statistics: int) -> None:
    """Add the sums that the bits of `statistics` name to the `out` of each entry (`nirvana.ops.backends.Matrices`)."""
    _Planned(table, statistics)()


def plan_saliency(table: Sequence[Matrices], statistics: int) -> _Planned:
    """`saliency` of these tensors, laid out once and launched by each call."""
    planned = _Planned(table, statistics)
    planned.table = [entry._replace(grad=None) for entry in table]  # whoever replaces gradients may let go of them
    return planned


class _Planned:
    """The launches for a table.

    Pass 1 is launched once for each pair of types and alignment in the table (commonly once), pass 2 once. The
    workspace is fp32: for each statistic one partial sum per 256 to 1024 elements summed over columns, per 16 to 256
    elements summed over rows, fewer where units are groups (`SaliencyConfig.levels`).
    """

    def __init__(self, table: Sequence[Matrices], statistics: int):
        self.table, self._statistics = table, statistics
        self._device = table[0].out.device
        self._reads_grads = bool(statistics & _OF_GRAD)
        self._lay_out()

    def __call__(self, grads: Sequence[Tensor] | None = None) -> None:
        if grads is not None and self._reads_grads:
            self._replace(grads)
        with on(self._device):
            partials = torch.empty(self._workspace, dtype=torch.float32, device=self._device)
            for kernel, grid, arguments, options in self._launches:
                kernel[grid](partials, *arguments, **options)

    def _replace(self, grads: Sequence[Tensor]) -> None:
        before = self._addresses
        addresses = [grad.data_ptr() for grad in grads]
        if len(grads) == 1 or any((old ^ new) % 16 for old, new in zip(before, addresses, strict=True)):
            # Another alignment may mean other launches. All of them or none: an upload may be refused.
            table = [entry._replace(grad=grad) for entry, grad in zip(self.table, grads, strict=True)]
            vars(self).update(vars(plan_saliency(table, self._statistics)))
            return
        with on(self._device):
            columns = [upload([addresses[entry] for entry in entries], self._device) for _, entries in self._columns]
            for (column, _), new in zip(self._columns, columns, strict=True):
                column.copy_(new)
        self._addresses = addresses

    def _lay_out(self) -> None:
        statistics = self._statistics
        count = statistics.bit_count()
        config = SaliencyConfig.of(count)
        tiles: dict[_Key, list[_Tiles]] = defaultdict(list)
        entries: dict[_Key, list[int]] = defaultdict(list)
        programs: dict[_Key, int] = defaultdict(int)
        terms: dict[tuple[int, int], list[Term]] = defaultdict(list)
        self._addresses = []
        self._workspace = 0
        for number, (weight, grad, axis, group, out) in enumerate(self.table):
            rows, columns = weight.shape
            weight_type = grad_type = None
            weight_address = grad_address = weight_stride = grad_stride = 0
            aligned = columns % 16 == 0
            if statistics & _OF_WEIGHT:
                weight_type, weight_address, weight_stride = weight.dtype, weight.data_ptr(), weight.stride(0)
                aligned = aligned and _aligned(weight_address, weight_stride, rows)
            if self._reads_grads:
                grad_type, grad_address, grad_stride = grad.dtype, grad.data_ptr(), grad.stride(0)
                aligned = aligned and _aligned(grad_address, grad_stride, rows)
                self._addresses.append(grad_address)
            row_span, column_span = config.span(rows, columns, axis)
            down, across = -(-rows // row_span), -(-columns // column_span)
            levels = config.levels(axis, group)
            length, splits = (columns, down) if axis else (rows, across)
            key = _Key(weight_type, grad_type, aligned)
            tiles[key].append(
                _Tiles(
                    programs[key],
                    self._workspace,
                    weight_address,
                    grad_address,
                    weight_stride,
                    grad_stride,
                    rows,
                    columns,
                    axis,
                    levels,
                    row_span,
                    column_span,
                )
            )
            entries[key].append(number)
            programs[key] += down * across
            term = Term(self._workspace, splits, length >> levels, group >> levels)
            terms[out.data_ptr(), length // group].append(term)
            self._workspace += count * splits * term.length
        self._plan_launches(config, tiles, entries, programs, terms)

    def _plan_launches(
        self,
        config: SaliencyConfig,
        tiles: dict[_Key, list[_Tiles]],
        entries: dict[_Key, list[int]],
        programs: dict[_Key, int],
        terms: dict[tuple[int, int], list[Term]],
    ) -> None:
        totals = TotalsConfig()
        outs: list[Out] = []
        programs_of_outs = first_term = 0
        for (address, units), of_out in terms.items():
            single = all(term.group == 1 for term in of_out)
            outs.append(Out(programs_of_outs, address, units, first_term, first_term + len(of_out), single))
            programs_of_outs += -(-units // totals.block_units) if single else units
            first_term += len(of_out)

        count = self._statistics.bit_count()
        grid = programs_of_outs, count
        blocks = {"BLOCK_SPLITS": totals.block_splits, "BLOCK_UNITS": totals.block_units}
        # Fusing g * w + sum would round once where the product rounds twice: other bits for "signed".
        of_totals = {**blocks, "num_warps": totals.num_warps, "enable_fp_fusion": False}
        if len(self.table) == 1:
            (key, (only,)), ((term,),) = *tiles.items(), terms.values()
            _, out, units, *_ = outs[0]
            self._launches = [
                _Launch(_saliency_tile_kernel, (programs[key],), only[2:], self._options(config, key)),
                _Launch(saliency_total_kernel, grid, (out, units, *term[1:]), of_totals),
            ]
            return

        host = Table()
        starts = {key: host.add(of_launch) for key, of_launch in tiles.items()}
        outs_start = host.add(outs)
        terms_start = host.add([term for of_out in terms.values() for term in of_out])
        with on(self._device):
            table = host.to(self._device)
        searched = {"SEARCH": SEARCH}
        self._launches = [
            _Launch(
                _saliency_tiles_kernel,
                (programs[key],),
                (table, start, len(tiles[key])),
                {**self._options(config, key), **searched},
            )
            for key, start in starts.items()
        ]
        arguments = (table, outs_start, len(outs), terms_start, first_term)
        self._launches.append(_Launch(saliency_totals_kernel, grid, arguments, {**of_totals, **searched}))
        place = _Tiles._fields.index("grad")
        #: For each launch of pass 1 where addresses of gradients stand, and of which entries.
        self._columns = [
            (table[start + place * len(of_launch) :][: len(of_launch)], of_launch)
            for start, of_launch in zip(starts.values(), entries.values(), strict=True)
        ]

    def _options(self, config: SaliencyConfig, key: _Key) -> dict[str, Any]:
        return {
            "MASK": self._statistics,
            "WEIGHT": _TYPES.get(key.weight),
            "GRAD": _TYPES.get(key.grad),
            "ALIGNED": key.aligned,
            "BLOCK_ROWS": config.block_rows,
            "BLOCK_COLUMNS": config.block_columns,
            "NUM_STAGES": config.num_stages,
            "num_warps": config.num_warps,
            "enable_fp_fusion": False,
        }


def _aligned(address: int, stride: int, rows: int) -> bool:
    """Whether each row starts at a multiple of 16 bytes, and at one of 16 elements from the first."""
    return address % 16 == 0 and (rows == 1 or stride % 16 == 0)
