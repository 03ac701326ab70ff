"""`mixture_bounds` in plain PyTorch and float64: the specification of the operator, on any device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nirvana.ops.mixture import MAX_ITERATIONS, TOLERANCE, VARIANCE_FLOOR

#: Responsibilities that exist at a time, 8 bytes each.
_AT_ONCE = 2**22
_LLOYD_STEPS = 300


def mixture(
    scores: Tensor, max_components: int, low_density: int, low: Tensor, high: Tensor, components: Tensor
) -> None:
    parts = [tensor.split(max(1, _AT_ONCE // (max_components * scores.shape[1]))) for tensor in (scores, low, high)]
    for rows, low_part, high_part, count in zip(*parts, components.split(len(parts[0][0])), strict=True):
        finite = rows.isfinite().all(1)
        ordered = torch.where(finite[:, None], rows, 0).sort(1).values
        z = _standardise(ordered.double())
        count.copy_(_choose(z, 1 + (ordered.diff(dim=1) != 0).sum(1), max_components, out := torch.empty_like(z)))
        # The (low_density + 1)-th lowest: nothing that ties with it is low-density.
        dense = out >= out.sort(1).values[:, low_density, None]
        first, after = _ends(dense)
        low_part.copy_(torch.where(finite, ordered.gather(1, first)[:, 0], math.nan))
        high_part.copy_(torch.where(finite, ordered.gather(1, after)[:, 0], math.nan))
        count[~finite] = 0


def _standardise(ordered: Tensor) -> Tensor:
    centred = ordered - _mean(ordered)
    spread = _mean(centred.square()).sqrt()
    # The mean of equal numbers may be off by a rounding.
    spread = torch.where((ordered[:, :1] == ordered[:, -1:]) | (spread == 0), 1.0, spread)
    return centred / spread


def _mean(terms: Tensor) -> Tensor:
    return _sum(terms)[:, None] / terms.shape[1]


def _sum(terms: Tensor) -> Tensor:
    # In parts, because torch splits a sum of more than 32 767 terms to one value between its threads.
    return torch.stack([part.sum(-1) for part in terms.split(16384, -1)]).sum(0)


def _ends(dense: Tensor) -> tuple[Tensor, Tensor]:
    """Indices ``[rows, 1]`` of the first and of the last score that is dense."""
    count = dense.int()
    return count.argmax(1, keepdim=True), dense.shape[1] - 1 - count.flip(1).argmax(1, keepdim=True)


def _choose(z: Tensor, distinct: Tensor, max_components: int, density: Tensor) -> Tensor:
    """Write the log-density of the mixture with the smallest BIC; return the number of its components."""
    best = torch.full_like(z[:, 0], math.inf)
    chosen = torch.zeros_like(distinct)
    cuts = torch.tensor([[0, z.shape[1]]], device=z.device).repeat(len(z), 1)
    for k in range(1, max_components + 1):
        cuts, likelihood, mine = _likeliest(z, cuts) if k > 1 else (cuts, _sum(one := _fit(z, cuts)), one)
        bic = -2 * likelihood + (3 * k - 1) * math.log(z.shape[1])
        better = (bic < best) & (k <= distinct)
        best = torch.where(better, bic, best)
        chosen = torch.where(better, k, chosen)
        density.copy_(torch.where(better[:, None], mine, density))
    return chosen


def _likeliest(z: Tensor, cuts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the mixtures with a component more, one for each cluster that is split, that of the highest likelihood: the
    clusters it started from, its log-likelihood ``[rows]``, -inf where no cluster can be split, and the log-density of
    each score."""
    best = (torch.cat([cuts, cuts[:, -1:]], 1), torch.full_like(z[:, 0], -math.inf), torch.zeros_like(z))
    for cluster in range(cuts.shape[1] - 1):
        start = _kmeans(z, cuts, cluster)
        density = _fit(z, start)
        # Where there are not enough scores a cluster may be empty.
        first = cuts[:, cluster, None].clamp_max(z.shape[1] - 1)
        divisible = z.gather(1, first) < z.gather(1, cuts[:, cluster + 1, None] - 1)
        likelihood = torch.where(divisible[:, 0], _sum(density), -math.inf)
        better = likelihood > best[1]
        best = tuple(
            torch.where(better[:, None] if new.dim() > 1 else better, new, old)
            for new, old in zip((start, likelihood, density), best, strict=True)
        )
    return best


def _kmeans(z: Tensor, cuts: Tensor, cluster: int) -> Tensor:
    """One cluster more, from a cut of `cluster`. Cluster k of a row is ``z[cuts[k]:cuts[k + 1]]``."""
    if z.shape[1] == 1:
        return torch.cat([cuts, cuts[:, -1:]], 1)
    sums = torch.nn.functional.pad(z.cumsum(1), (1, 0))
    inner = torch.arange(1, z.shape[1], device=z.device)
    left, right = cuts[:, cluster, None], cuts[:, cluster + 1, None]
    n_left, n_right = inner - left, right - inner
    middle = sums[:, 1:-1]
    gap = (middle - sums.gather(1, left)) / n_left - (sums.gather(1, right) - middle) / n_right
    gain = gap.square() * (n_left * n_right / (n_left + n_right))
    gain = torch.where((n_left > 0) & (n_right > 0), gain, -1.0)
    cuts = torch.cat([cuts, 1 + gain.argmax(1, keepdim=True)], 1).sort(1).values
    for _ in range(_LLOYD_STEPS):
        means = sums.gather(1, cuts).diff(dim=1) / cuts.diff(dim=1)
        new = cuts.clone()
        new[:, 1:-1] = torch.searchsorted(z, (means[:, 1:] + means[:, :-1]) / 2, right=True)
        # No cluster may lose its last score.
        new = torch.where((new.diff(dim=1) > 0).all(1, keepdim=True), new, cuts)
        if torch.equal(new, cuts):
            break
        cuts = new
    return cuts


def _fit(z: Tensor, cuts: Tensor) -> Tensor:
    """Expectation-maximisation from clusters: log-density of each score ``[rows, m]``."""
    place = torch.arange(z.shape[1], device=z.device)
    shares = ((place >= cuts[:, :-1, None]) & (place < cuts[:, 1:, None])).double()
    parameters = _maximise(z, shares)
    running = torch.arange(len(z), device=z.device)
    before = torch.full_like(z[:, 0], -math.inf)
    for _ in range(MAX_ITERATIONS):
        logs, density = _expect(z[running], *(parameter[running] for parameter in parameters))
        updates = _maximise(z[running], (logs - density[:, None]).exp())
        for parameter, update in zip(parameters, updates, strict=True):
            parameter[running] = update
        likelihood = _mean(density)[:, 0]
        changed = (likelihood - before[running]).abs() >= TOLERANCE
        before[running] = likelihood
        running = running[changed]
        if not len(running):
            break
    return _expect(z, *parameters)[1]


def _maximise(z: Tensor, shares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, means and variances ``[rows, k]``."""
    mass = _sum(shares) + 10 * torch.finfo(torch.float64).eps
    means = _sum(shares * z[:, None]) / mass
    variances = _sum(shares * (z[:, None] - means[:, :, None]).square()) / mass + VARIANCE_FLOOR
    return mass / mass.sum(1, keepdim=True), means, variances


def _expect(z: Tensor, weights: Tensor, means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithms of weight times density of each component ``[rows, k, m]``, and of their sum ``[rows, m]``."""
    offset = weights.log() - 0.5 * (2 * math.pi * variances).log()
    logs = offset[:, :, None] - (z[:, None] - means[:, :, None]).square() / (2 * variances[:, :, None])
    return logs, logs.logsumexp(1)
