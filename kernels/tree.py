"""Sums in an order that the source fixes, not the compiler."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sum_rows(x):
    """[columns] of [rows, columns]: the lower half of the rows is added to the upper one until one row is left.

    Unlike that of `tl.sum`, this tree does not depend on how a block lies over threads, and so not on alignment, types,
    warps, architecture or version of Triton. Reshaping moves nothing.
    """
    for _ in tl.static_range(16):
        if x.shape[0] > 1:
            x = tl.sum(tl.reshape(x, [2, x.shape[0] // 2, x.shape[1]]), axis=0)
    return tl.reshape(x, [x.shape[1]])


@triton.jit
def sum_columns(x):
    """[rows] of [rows, columns], as `sum_rows`, neighbours first: they lie in one thread."""
    for _ in tl.static_range(16):
        if x.shape[1] > 1:
            x = tl.sum(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]), axis=2)
    return tl.reshape(x, [x.shape[0]])


@triton.jit
def sum_vector(x):
    """Scalar sum of [length], neighbours first."""
    return tl.sum(sum_columns(x[None, :]), axis=0)


@triton.jit
def fold(x, levels):
    """[length] of [length], a power of two: each element becomes the sum of the 2**levels consecutive ones that it is
    one of, neighbours first. `levels` is known when the program runs: 0 leaves all as it is, and costs a comparison."""
    for level in tl.static_range(8):
        if 2 << level <= x.shape[0]:  # noqa: SIM102 - decided when compiled, unlike the next
            if level < levels:
                pairs = tl.reshape(x, [x.shape[0] >> (level + 1), 2, 1 << level])
                both = tl.sum(pairs, axis=1)[:, None, :].broadcast_to(pairs.shape)
                x = tl.reshape(both, [x.shape[0]])
    return x
