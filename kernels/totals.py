"""The second pass of saliency: partial sums of each unit are added up, and the totals to the outputs."""

# ruff: noqa: N803 - compile-time arguments are upper case, as everywhere in Triton

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from nirvana.kernels.table import locate
from nirvana.kernels.tree import sum_rows, sum_vector


class Out(NamedTuple):
    """A row of the table of outputs. `out` is an address; the terms are a range of rows of the table of terms."""

    first_program: int
    out: int
    units: int
    first_term: int
    last_term: int
    single: bool  # units of all terms are single positions


class Term(NamedTuple):
    """What one matrix adds to its output: for a unit the total of `group` positions of each split.

    Its partial sums are [statistics, splits, length].
    """

    partials: int  # where they start in the workspace
    splits: int
    length: int
    group: int


@triton.jit
def _sum_of_splits(sums_ptr, splits, length, position, mask, BLOCK_SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """fp64 [BLOCK]: sums over the splits at some positions."""
    sums = tl.zeros([BLOCK_SPLITS, BLOCK], tl.float64)
    for start in range(0, splits, BLOCK_SPLITS):
        split = start + tl.arange(0, BLOCK_SPLITS).to(tl.int64)
        pointers = sums_ptr + split[:, None] * length + position[None, :]
        sums += tl.load(pointers, mask=(split < splits)[:, None] & mask[None, :], other=0.0).to(tl.float64)
    return sum_rows(sums)


@triton.jit
def _total_of_single(total, sums_ptr, splits, length, unit, mask, BLOCK_SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Add a term to a block of units that are one position each: a lane a unit."""
    return total + _sum_of_splits(sums_ptr, splits, length, unit, mask, BLOCK_SPLITS, BLOCK).to(tl.float32)


@triton.jit
def _total_of_group(total, sums_ptr, splits, length, group, unit, BLOCK_SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Add a term to one unit. A group of 1 has the bits of `_total_of_single`: zeros of masked lanes do not round."""
    sums = tl.zeros([BLOCK], tl.float64)
    for start in range(0, group, BLOCK):
        member = start + tl.arange(0, BLOCK)
        position = unit * group + member
        sums += _sum_of_splits(sums_ptr, splits, length, position, member < group, BLOCK_SPLITS, BLOCK)
    return total + sum_vector(sums).to(tl.float32)


@triton.jit(do_not_specialize=["outs_start", "outs", "terms_start", "terms"])
def saliency_totals_kernel(
    partial_ptr,
    table_ptr,
    outs_start,
    outs,
    terms_start,
    terms,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
    SEARCH: tl.constexpr,
):
    """A program a statistic and block of single units, or unit of several positions, of each output in the table."""
    program = tl.program_id(0).to(tl.int64)
    statistic = tl.program_id(1).to(tl.int64)
    out = table_ptr + outs_start
    out += locate(out, outs, program, SEARCH)
    # The columns of `Out`, in its order.
    block = program - tl.load(out)
    address = tl.load(out + outs)
    units = tl.load(out + 2 * outs)
    first = tl.load(out + 3 * outs)
    last = tl.load(out + 4 * outs)
    single = tl.load(out + 5 * outs)
    out_ptr = address.to(tl.pointer_type(tl.float32)) + statistic * units
    term_ptr = table_ptr + terms_start
    if single:
        unit = block * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)
        mask = unit < units
        totals = tl.load(out_ptr + unit, mask=mask, other=0.0)
        for index in range(first, last):
            # The columns of `Term`, in its order.
            term = term_ptr + index
            splits = tl.load(term + terms)
            length = tl.load(term + 2 * terms)
            sums_ptr = partial_ptr + tl.load(term) + statistic * splits * length
            totals = _total_of_single(totals, sums_ptr, splits, length, unit, mask, BLOCK_SPLITS, BLOCK_UNITS)
        tl.store(out_ptr + unit, totals, mask=mask)
    else:
        total = tl.load(out_ptr + block)
        for index in range(first, last):
            term = term_ptr + index
            splits = tl.load(term + terms)
            length = tl.load(term + 2 * terms)
            group = tl.load(term + 3 * terms)
            sums_ptr = partial_ptr + tl.load(term) + statistic * splits * length
            total = _total_of_group(total, sums_ptr, splits, length, group, block, BLOCK_SPLITS, BLOCK_UNITS)
        tl.store(out_ptr + block, total)


@triton.jit(do_not_specialize=["out", "units", "splits", "length", "group"])
def saliency_total_kernel(
    partial_ptr,
    out: tl.int64,
    units: tl.int64,
    splits: tl.int64,
    length: tl.int64,
    group: tl.int64,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_UNITS: tl.constexpr,
):
    """`saliency_totals_kernel` of one output with one term: its numbers are arguments, so there is no table to load."""
    block = tl.program_id(0).to(tl.int64)
    statistic = tl.program_id(1).to(tl.int64)
    out_ptr = out.to(tl.pointer_type(tl.float32)) + statistic * units
    sums_ptr = partial_ptr + statistic * splits * length
    if group == 1:
        unit = block * BLOCK_UNITS + tl.arange(0, BLOCK_UNITS)
        mask = unit < units
        totals = tl.load(out_ptr + unit, mask=mask, other=0.0)
        totals = _total_of_single(totals, sums_ptr, splits, length, unit, mask, BLOCK_SPLITS, BLOCK_UNITS)
        tl.store(out_ptr + unit, totals, mask=mask)
    else:
        total = tl.load(out_ptr + block)
        total = _total_of_group(total, sums_ptr, splits, length, group, block, BLOCK_SPLITS, BLOCK_UNITS)
        tl.store(out_ptr + block, total)
