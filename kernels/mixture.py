"""Gaussian mixtures of rows of scores: `nirvana.ops.mixture_bounds`, a row or a start of a row a program.

Rows are sorted by torch. One launch standardises them; one for each number of components fits mixtures, each start in a
program of its own; one evaluates the density of the mixture with the smallest BIC, one finds the ends. Densities are in
fp32 and sums of up to 32 terms a lane too; everything else is in fp64.
"""

# ruff: noqa: N803, RUF005 - compile-time arguments are upper case, as everywhere in Triton; no unpacking there

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nirvana.kernels.clusters import cluster_of, edges, lloyd, mean_of, split
from nirvana.kernels.config import MixtureConfig
from nirvana.kernels.table import on
from nirvana.kernels.tree import sum_vector
from nirvana.ops import mixture as specification

#: Scores that are worked on at a time, 24 bytes of workspace each.
AT_ONCE = 2**24

_INFINITY = tl.constexpr(float("inf"))
_TWO_PI = tl.constexpr(6.283185307179586)
_VARIANCE_FLOOR = tl.constexpr(specification.VARIANCE_FLOOR)
_TOLERANCE = tl.constexpr(specification.TOLERANCE)
_MAX_ITERATIONS = tl.constexpr(specification.MAX_ITERATIONS)
# Keeps a component without scores from dividing by zero; 10 rounding errors, as in scikit-learn.
_LEAST_MASS = tl.constexpr(10 * 2.0**-52)
# What is kept of a fit, all in fp64: the log-likelihood, -inf where there is none; offset, mean and scale of each
# component; the cuts between the clusters that it started from.
_COMPONENTS_AT = tl.constexpr(1)
_CUTS_AT = tl.constexpr(1 + 3 * specification.COMPONENTS)
_FIT = tl.constexpr(4 * specification.COMPONENTS)


@triton.jit(do_not_specialize=["length"])
def _prepare_kernel(ordered_ptr, z_ptr, sums_ptr, distinct_ptr, stride, length, BLOCK: tl.constexpr):
    """Standardised rows, their prefix sums, and how many different scores they have: 0 where not all are finite."""
    row = tl.program_id(0).to(tl.int64)
    ordered_ptr += row * length
    z_ptr += row * stride
    sums_ptr += row * stride
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    distinct = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, length, BLOCK):
        index = start + lanes
        mask = index < length
        x = tl.load(ordered_ptr + index, mask=mask, other=0.0)
        before = tl.load(ordered_ptr + index - 1, mask=mask & (index > 0), other=0.0)
        total += x.to(tl.float64)
        distinct += (mask & ((index == 0) | (x != before))).to(tl.int32)
    mean = sum_vector(total) / length.to(tl.float64)
    squares = tl.zeros([BLOCK], tl.float64)
    for start in tl.range(0, length, BLOCK):
        index = start + lanes
        centred = tl.load(ordered_ptr + index, mask=index < length, other=0.0).to(tl.float64) - mean
        squares += tl.where(index < length, centred * centred, 0.0)
    spread = tl.sqrt(sum_vector(squares) / length.to(tl.float64))
    # NaN is sorted last.
    first = tl.load(ordered_ptr)
    last = tl.load(ordered_ptr + length - 1)
    # The mean of equal numbers may be off by a rounding.
    spread = tl.where((first == last) | (spread == 0), 1.0, spread)
    sum_so_far = mean * 0
    for start in tl.range(0, length, BLOCK):
        index = start + lanes
        mask = index < length
        x = tl.load(ordered_ptr + index, mask=mask, other=0.0).to(tl.float64)
        z = tl.where(mask, (x - mean) / spread, 0.0).to(tl.float32)
        tl.store(z_ptr + index, z, mask=mask)
        tl.store(sums_ptr + index, sum_so_far + tl.cumsum(z.to(tl.float64), axis=0), mask=mask)
        sum_so_far += sum_vector(z.to(tl.float64))
    finite = (tl.abs(first) < _INFINITY) & (tl.abs(last) < _INFINITY)
    tl.store(distinct_ptr + row, tl.where(finite, tl.sum(distinct, axis=0), 0))


@triton.jit
def _rounded(masses, means, variances, K: tl.constexpr):
    """(offset, mean, scale) of the components, fp32: the logarithm of weight times density is
    ``offset - ((x - mean) * scale)^2``."""
    total = masses[0]
    for k in tl.static_range(1, K):
        total += masses[k]
    mixture = ()
    for k in tl.static_range(K):
        offset = tl.log(masses[k] / total) - 0.5 * tl.log(variances[k] * _TWO_PI)
        scale = tl.sqrt(0.5 / variances[k])
        mixture = mixture + ((offset.to(tl.float32), means[k].to(tl.float32), scale.to(tl.float32)),)
    return mixture


@triton.jit
def _of_clusters(z_ptr, sums_ptr, cuts, length, K: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    begins = edges(cuts, length)
    means = ()
    squares = ()
    for k in tl.static_range(K):
        means = means + (mean_of(sums_ptr, begins[k], begins[k + 1]),)
        squares = squares + (tl.zeros([BLOCK], tl.float64),)
    for start in tl.range(0, length, BLOCK):
        index = start + lanes
        z = tl.load(z_ptr + index, mask=index < length, other=0.0).to(tl.float64)
        new = ()
        for k in tl.static_range(K):
            mine = (index >= begins[k]) & (index < begins[k + 1])
            new = new + (squares[k] + tl.where(mine, (z - means[k]) * (z - means[k]), 0.0),)
        squares = new
    masses = ()
    variances = ()
    for k in tl.static_range(K):
        mass = (begins[k + 1] - begins[k]).to(tl.float64) + _LEAST_MASS
        masses = masses + (mass,)
        variances = variances + (sum_vector(squares[k]) / mass + _VARIANCE_FLOOR,)
    return _rounded(masses, means, variances, K)


@triton.jit
def _zeros(COUNT: tl.constexpr, BLOCK: tl.constexpr, dtype: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(COUNT):
        zeros = zeros + (tl.zeros([BLOCK], dtype),)
    return zeros


@triton.jit
def _expect(z_ptr, mixture, length, K: tl.constexpr, BLOCK: tl.constexpr, TERMS: tl.constexpr):
    """Sums over the scores: the log-likelihood; then of each component those of share, share t and share t^2, where
    t = (x - mean) * scale."""
    lanes = tl.arange(0, BLOCK)
    wide = _zeros(1 + 3 * K, BLOCK, tl.float64)
    for part in tl.range(0, length, BLOCK * TERMS):
        sums = _zeros(1 + 3 * K, BLOCK, tl.float32)
        for start in tl.range(part, tl.minimum(part + BLOCK * TERMS, length), BLOCK):
            index = start + lanes
            mask = index < length
            x = tl.load(z_ptr + index, mask=mask, other=0.0)
            t = ()
            logs = ()
            for k in tl.static_range(K):
                t = t + ((x - mixture[k][1]) * mixture[k][2],)
                logs = logs + (mixture[k][0] - t[k] * t[k],)
            peak = logs[0]
            for k in tl.static_range(1, K):
                peak = tl.maximum(peak, logs[k])
            parts = ()
            for k in tl.static_range(K):
                parts = parts + (tl.exp(logs[k] - peak),)
            total = parts[0]
            for k in tl.static_range(1, K):
                total += parts[k]
            one = tl.where(mask, 1.0 / total, 0.0)
            new = (sums[0] + tl.where(mask, peak + tl.log(total), 0.0),)
            for k in tl.static_range(K):
                share = parts[k] * one
                moment = share * t[k]
                new = new + (sums[3 * k + 1] + share, sums[3 * k + 2] + moment, sums[3 * k + 3] + moment * t[k])
            sums = new
        new = ()
        for k in tl.static_range(1 + 3 * K):
            new = new + (wide[k] + sums[k].to(tl.float64),)
        wide = new
    sums = ()
    for k in tl.static_range(1 + 3 * K):
        sums = sums + (sum_vector(wide[k]),)
    return sums


@triton.jit
def _maximise(mixture, sums, K: tl.constexpr):
    masses = ()
    means = ()
    variances = ()
    for k in tl.static_range(K):
        mass = sums[3 * k + 1] + _LEAST_MASS
        first = sums[3 * k + 2] / mass
        second = sums[3 * k + 3] / mass
        scale = mixture[k][2].to(tl.float64)
        masses = masses + (mass,)
        means = means + (mixture[k][1].to(tl.float64) + first / scale,)
        variances = variances + (tl.maximum(second - first * first, 0.0) / (scale * scale) + _VARIANCE_FLOOR,)
    return _rounded(masses, means, variances, K)


@triton.jit
def _fit(z_ptr, sums_ptr, fit_ptr, cuts, length, K: tl.constexpr, BLOCK: tl.constexpr, TERMS: tl.constexpr):
    """Expectation-maximisation from clusters."""
    mixture = _of_clusters(z_ptr, sums_ptr, cuts, length, K, BLOCK)
    sums = _expect(z_ptr, mixture, length, K, BLOCK, TERMS)
    before = sums[0] * 0 - _INFINITY
    step = 0
    going = True
    while going:
        likelihood = sums[0] / length.to(tl.float64)
        mixture = _maximise(mixture, sums, K)
        sums = _expect(z_ptr, mixture, length, K, BLOCK, TERMS)
        step += 1
        going = (tl.abs(likelihood - before) >= _TOLERANCE) & (step < _MAX_ITERATIONS)
        before = likelihood
    tl.store(fit_ptr, sums[0])
    for k in tl.static_range(K):
        for part in tl.static_range(3):
            tl.store(fit_ptr + _COMPONENTS_AT + 3 * k + part, mixture[k][part].to(tl.float64))
    for k in tl.static_range(K - 1):
        tl.store(fit_ptr + _CUTS_AT + k, cuts[k].to(tl.float64))


@triton.jit(do_not_specialize=["length", "depth"])
def _fit_kernel(
    z_ptr,
    sums_ptr,
    distinct_ptr,
    fits_ptr,
    stride,
    fits,
    length,
    depth,
    K: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
    TERMS: tl.constexpr,
):
    """A mixture of K components: that of program (row, j) starts with cluster j of the best mixture of K - 1 split.

    Those of K - 1 are in the K - 2 slots before `FIRST`, but that of one component is in one.
    """
    row = tl.program_id(0).to(tl.int64)
    cluster = tl.program_id(1)
    z_ptr += row * stride
    sums_ptr += row * stride
    fits_ptr += (row * fits + FIRST) * _FIT
    if tl.load(distinct_ptr + row) >= K:
        if K == 1:
            _fit(z_ptr, sums_ptr, fits_ptr, (), length, K, BLOCK, TERMS)
        else:
            previous = fits_ptr - _FIT * (K - 2 if K > 2 else 1)
            best = previous
            for j in tl.static_range(1, K - 2):
                other = previous + j * _FIT
                best = tl.where(tl.load(other) > tl.load(best), other, best)
            cuts = ()
            for k in tl.static_range(K - 2):
                cuts = cuts + (tl.load(best + _CUTS_AT + k).to(tl.int32),)
            begin, end = cluster_of(cuts, cluster, length, K - 2)
            # Of equal numbers alone no cut makes a better start; and what is not there has no likelihood.
            divisible = tl.load(z_ptr + begin) < tl.load(z_ptr + end - 1)
            if divisible & (tl.load(best) > -_INFINITY):
                start = split(sums_ptr, cuts, begin, end, K - 2, BLOCK)
                settled = lloyd(z_ptr, sums_ptr, start, length, depth, K - 1)
                _fit(z_ptr, sums_ptr, fits_ptr + cluster * _FIT, settled, length, K, BLOCK, TERMS)


@triton.jit(do_not_specialize=["length", "most"])
def _density_kernel(z_ptr, fits_ptr, density_ptr, components_ptr, stride, fits, length, most, BLOCK: tl.constexpr):
    """Log-density of each score under the mixture with the smallest BIC, and the number of its components; 0 for rows
    that have none."""
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride
    density_ptr += row * length
    fits_ptr += row * fits * _FIT
    best_ptr = fits_ptr
    components = most * 0
    best = tl.full([], _INFINITY, tl.float64)
    penalty = tl.log(length.to(tl.float64))
    for k in tl.range(1, most + 1):
        for _ in tl.range(tl.maximum(k - 1, 1)):
            bic = penalty * (3 * k - 1) - tl.load(fits_ptr) * 2
            better = bic < best
            best_ptr = tl.where(better, fits_ptr, best_ptr)
            components = tl.where(better, k, components)
            best = tl.where(better, bic, best)
            fits_ptr += _FIT
    lanes = tl.arange(0, BLOCK)
    for start in tl.range(0, length, BLOCK):
        index = start + lanes
        x = tl.load(z_ptr + index, mask=index < length, other=0.0)
        peak = tl.full([BLOCK], -_INFINITY, tl.float32)
        for k in tl.range(components):
            peak = tl.maximum(peak, _log_part(x, best_ptr, k))
        total = tl.zeros([BLOCK], tl.float32)
        for k in tl.range(components):
            total += tl.exp(_log_part(x, best_ptr, k) - peak)
        density = peak.to(tl.float64) + tl.log(total.to(tl.float64))
        tl.store(density_ptr + index, tl.where(components > 0, density, 0.0), mask=index < length)
    tl.store(components_ptr + row, components)


@triton.jit
def _log_part(x, fit_ptr, k):
    fit_ptr += _COMPONENTS_AT + 3 * k
    t = (x - tl.load(fit_ptr + 1).to(tl.float32)) * tl.load(fit_ptr + 2).to(tl.float32)
    return tl.load(fit_ptr).to(tl.float32) - t * t


@triton.jit(do_not_specialize=["length"])
def _ends_kernel(
    ordered_ptr, density_ptr, threshold_ptr, components_ptr, low_ptr, high_ptr, length, BLOCK: tl.constexpr
):
    """The first and the last score that is dense; NaN for rows without a mixture."""
    row = tl.program_id(0).to(tl.int64)
    ordered_ptr += row * length
    density_ptr += row * length
    threshold = tl.load(threshold_ptr + row)
    components = tl.load(components_ptr + row)
    lanes = tl.arange(0, BLOCK)
    start = length * 0
    first = length
    # A density that is not a number must not hang the device.
    while (first == length) & (start < length):
        index = start + lanes
        density = tl.load(density_ptr + index, mask=index < length, other=-_INFINITY)
        first = tl.min(tl.where(density >= threshold, index, length), axis=0)
        start += BLOCK
    start = length * 0
    last = length * 0 - 1
    while (last < 0) & (start < length):
        index = length - 1 - start - lanes
        density = tl.load(density_ptr + index, mask=index >= 0, other=-_INFINITY)
        last = tl.max(tl.where(density >= threshold, index, -1), axis=0)
        start += BLOCK
    tl.store(low_ptr + row, tl.where(components > 0, tl.load(ordered_ptr + first, mask=first < length), float("nan")))
    tl.store(high_ptr + row, tl.where(components > 0, tl.load(ordered_ptr + last, mask=last >= 0), float("nan")))


def mixture(
    scores: Tensor, max_components: int, low_density: int, low: Tensor, high: Tensor, components: Tensor
) -> None:
    """Write `nirvana.ops.mixture_bounds` of each row of `scores`, fp32 ``[units, m]``, contiguous; `low_density` of a
    row's scores are low-density at most."""
    with on(scores.device):
        parts = [part.split(max(1, AT_ONCE // scores.shape[1])) for part in (scores, low, high, components)]
        for part in zip(*parts, strict=True):
            _launch(*part, max_components, low_density)


def _launch(scores: Tensor, low: Tensor, high: Tensor, components: Tensor, most: int, low_density: int) -> None:
    units, length = scores.shape
    config, device = MixtureConfig.of(length), scores.device
    options = {"BLOCK": config.block, "num_warps": config.num_warps, "enable_fp_fusion": False}
    ordered = scores.sort(1).values
    # So that every row is aligned alike, and so added alike.
    stride = triton.cdiv(length, 16) * 16
    z = torch.empty(units, stride, dtype=torch.float32, device=device)
    sums = torch.empty(units, stride, dtype=torch.float64, device=device)
    distinct = torch.empty(units, dtype=torch.int32, device=device)
    _prepare_kernel[(units,)](ordered, z, sums, distinct, stride, length, **options)
    starts = [max(k - 1, 1) for k in range(1, most + 1)]
    fits = torch.full((units, sum(starts), _FIT.value), -torch.inf, dtype=torch.float64, device=device)
    for k in range(1, most + 1):
        _fit_kernel[(units, starts[k - 1])](
            z,
            sums,
            distinct,
            fits,
            stride,
            sum(starts),
            length,
            length.bit_length(),
            K=k,
            FIRST=sum(starts[: k - 1]),
            TERMS=config.terms,
            # Unasked, the compiler spills a few registers to fit a program more on a multiprocessor.
            maxnreg=255,
            **options,
        )
    density = torch.empty(units, length, dtype=torch.float64, device=device)
    _density_kernel[(units,)](z, fits, density, components, stride, sum(starts), length, most, **options)
    # The (low_density + 1)-th lowest: nothing that ties with it is low-density.
    threshold = density.topk(low_density + 1, dim=1, largest=False, sorted=False).values.amax(1)
    _ends_kernel[(units,)](ordered, density, threshold, components, low, high, length, **options)
