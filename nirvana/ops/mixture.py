"""Where the outliers of a unit's scores begin: a Gaussian mixture of each row, and the ends of its dense part."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nirvana.ops.backends import choose
from nirvana.ops.schemas import implements, traced

#: The most components that backends fit.
COMPONENTS = 8
#: Added to every variance of a standardised row; and the change of the mean log-likelihood that ends a fit.
#: scikit-learn's defaults.
VARIANCE_FLOOR = 1e-6
TOLERANCE = 1e-3
MAX_ITERATIONS = 100


class MixtureBounds(NamedTuple):
    """What `mixture_bounds` gives.

    Attributes:
        low, high: fp32 ``[units]``: the outermost scores that are no outliers. ``scores.clamp(low, high)`` winsorises.
        components: int32 ``[units]``: Gaussians of the chosen mixture.
    """

    low: Tensor
    high: Tensor
    components: Tensor


def mixture_bounds(scores: Tensor, *, max_components: int = 5, density_fraction: float = 0.02) -> MixtureBounds:
    """The range of each row of `scores` without the outliers at its two ends. Source: the GMM form of AFR.

    A row is standardised; one-dimensional Gaussian mixtures of 1, 2, ... `max_components` components are fitted to it
    by expectation-maximisation; the one with the smallest BIC is taken (of equal ones the smallest). The
    ``floor(density_fraction * m)`` scores of the lowest density are low-density, those that tie with the next one
    excepted. In the sorted row the unbroken runs of low-density scores at the two ends are the outliers.

    As scikit-learn's GaussianMixture on a standardised row: ``reg_covar=1e-6, tol=1e-3, max_iter=100``. The start is
    another one, because scikit-learn's is drawn at random. Mixtures of K components start from the clusters that the
    best mixture of K - 1 started from, with one of them cut where that lowers the sum of squares most, then Lloyd's
    steps until nothing moves; each cluster is cut in turn, and the mixture of the highest likelihood is taken. A row
    has no more components than different scores.

    Args:
        scores: ``[units, m]``, fp32; other floating-point types through an fp32 copy.
        max_components: 1 to 8.
        density_fraction: 0 to below 1; where it is less than ``1 / m`` nothing is an outlier.

    Returns:
        `MixtureBounds`, not differentiable. A row that holds NaN or an infinity has NaN bounds and 0 components. Equal
        bits on every run, for any number of threads.

    Raises:
        ValueError: shape, type or a number does not fit.
    """
    if scores.dim() != 2 or scores.shape[1] == 0:
        raise ValueError(f"scores have shape {list(scores.shape)}: [units, m] with m of at least 1 is needed")
    if not scores.is_floating_point():
        raise ValueError(f"scores are {scores.dtype}: floating-point types are supported")
    if max_components not in range(1, COMPONENTS + 1):
        raise ValueError(f"max_components {max_components} must be 1 to {COMPONENTS}")
    if not 0 <= density_fraction < 1:
        raise ValueError(f"density_fraction {density_fraction} must be at least 0 and below 1")
    with torch.no_grad():
        call = torch.ops.nirvana.mixture_bounds if traced(scores) else _bounds
        return MixtureBounds(*call(scores, max_components, density_fraction))


@implements("mixture_bounds")
def _bounds(scores: Tensor, max_components: int, density_fraction: float) -> tuple[Tensor, Tensor, Tensor]:
    units, length = scores.shape
    low, high = (torch.empty(units, dtype=torch.float32, device=scores.device) for _ in range(2))
    components = torch.empty(units, dtype=torch.int32, device=scores.device)
    if units and not scores.is_meta:  # the reference looks at numbers to know when it is done
        scores = scores.resolve_neg().float().contiguous()
        # Counted once, so that all backends have the same number.
        choose(scores.device).mixture(scores, max_components, int(density_fraction * length), low, high, components)
    return low, high, components
