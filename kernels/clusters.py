"""k-means of sorted numbers on a line: clusters are unbroken runs, so a clustering is a tuple of cuts.

Cut k is the index of the first number of cluster k + 1. Sums of any run come from two prefix sums, so a step of Lloyd
needs a binary search a cut, and no pass over the numbers.
"""

# ruff: noqa: N803, RUF005 - compile-time arguments are upper case, as everywhere in Triton; no unpacking there

from __future__ import annotations

import triton
import triton.language as tl

LLOYD_STEPS = tl.constexpr(300)


@triton.jit
def sum_before(sums_ptr, index):
    """Sum of the numbers before `index`; `sums_ptr` has that of each number and all before it."""
    return tl.load(sums_ptr + index - 1, mask=index > 0, other=0.0)


@triton.jit
def edges(cuts, length):
    """(0, cuts, length): cluster k begins at edge k and ends before edge k + 1."""
    # Made of a number that the kernel got, so that all have its type.
    return (length * 0,) + cuts + (length,)


@triton.jit
def mean_of(sums_ptr, begin, end):
    return (sum_before(sums_ptr, end) - sum_before(sums_ptr, begin)) / (end - begin).to(tl.float64)


@triton.jit
def cluster_of(cuts, cluster, length, CUTS: tl.constexpr):
    """Where a cluster begins, and where it ends."""
    bounds = edges(cuts, length)
    begin = bounds[0]
    end = bounds[1]
    for k in tl.static_range(1, CUTS + 1):
        begin = tl.where(cluster == k, bounds[k], begin)
        end = tl.where(cluster == k, bounds[k + 1], end)
    return begin, end


@triton.jit
def split(sums_ptr, cuts, begin, end, CUTS: tl.constexpr, BLOCK: tl.constexpr):
    """A cut more, between `begin` and `end`, where it lowers the sum of squares most; of equal places the first."""
    lanes = tl.arange(0, BLOCK)
    sum_left = sum_before(sums_ptr, begin)
    sum_right = sum_before(sums_ptr, end)
    best = tl.full([BLOCK], -1.0, tl.float64)
    place = lanes * 0 + end
    for start in tl.range(begin + 1, end, BLOCK):
        index = start + lanes
        inside = index < end
        middle = tl.load(sums_ptr + index - 1, mask=inside, other=0.0)
        n_left = (index - begin).to(tl.float64)
        n_right = tl.where(inside, end - index, 1).to(tl.float64)
        gap = (middle - sum_left) / n_left - (sum_right - middle) / n_right
        gain = tl.where(inside, gap * gap * (n_left * n_right / (n_left + n_right)), -1.0)
        place = tl.where(gain > best, index, place)
        best = tl.maximum(best, gain)
    place = tl.min(tl.where(best == tl.max(best, axis=0), place, end), axis=0)
    more = ()
    for k in tl.static_range(CUTS):
        more = more + (tl.minimum(cuts[k], place),)
        place = tl.maximum(cuts[k], place)
    return more + (place,)


@triton.jit
def lloyd(z_ptr, sums_ptr, cuts, length, depth, CUTS: tl.constexpr):
    """Cuts after Lloyd's steps: each number to the nearest mean, until nothing moves or a cluster would be empty.

    `depth` halvings leave nothing of `length`.
    """
    step = 0
    moving = True
    while moving:
        bounds = edges(cuts, length)
        middles = ()
        low = ()
        high = ()
        for k in tl.static_range(CUTS):
            below = mean_of(sums_ptr, bounds[k], bounds[k + 1])
            above = mean_of(sums_ptr, bounds[k + 1], bounds[k + 2])
            middles = middles + ((below + above) / 2,)
            low = low + (length * 0,)
            high = high + (length,)
        # All cuts at once: each halving waits for memory.
        for _ in tl.range(depth):
            new_low = ()
            new_high = ()
            for k in tl.static_range(CUTS):
                open_ = low[k] < high[k]
                half = (low[k] + high[k]) // 2
                up = open_ & (tl.load(z_ptr + half, mask=open_, other=0.0).to(tl.float64) <= middles[k])
                new_low = new_low + (tl.where(up, half + 1, low[k]),)
                new_high = new_high + (tl.where(up | (low[k] >= high[k]), high[k], half),)
            low = new_low
            high = new_high
        bounds = edges(low, length)
        whole = True
        moved = False
        for k in tl.static_range(CUTS):
            whole = whole & (bounds[k] < bounds[k + 1])
            moved = moved | (low[k] != cuts[k])
        whole = whole & (bounds[CUTS] < length)
        new = ()
        for k in tl.static_range(CUTS):
            new = new + (tl.where(whole, low[k], cuts[k]),)
        cuts = new
        step += 1
        moving = whole & moved & (step < LLOYD_STEPS)
    return cuts
