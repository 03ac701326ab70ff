"""scikit-learn's way of `mixture_bounds`, row by row, and how two ways agree."""

from __future__ import annotations

import itertools
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nirvana.ops import MixtureBounds
from nirvana.ops.backends import reference_mixture

COMPONENTS, FRACTION = 5, 0.02


class Found(NamedTuple):
    """Of each row: what `mixture_bounds` gives, and the BIC of the mixture (None: not known)."""

    bounds: MixtureBounds
    bic: Tensor | None = None


def scikit_learn(scores: Tensor, seed: int | None = 0, starts: int = 1) -> Found:
    """From the likeliest of so many random starts, or from those of nirvana (`seed` None). In one thread, its fastest.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that 100 iterations were not enough
        rows = [_row(row, seed, starts) for row in scores.double()]
    low, high, components, bic = (torch.tensor(column) for column in zip(*rows, strict=True))
    return Found(MixtureBounds(low, high, components), bic)


def _row(row: Tensor, seed: int | None, starts: int) -> tuple[float, float, int, float]:
    from sklearn.mixture import GaussianMixture

    ordered = row.sort().values
    z = (ordered - ordered.mean()) / ordered.std(correction=0)
    x = z[:, None].numpy()
    if seed is None:
        models = _from_our_starts(z)
    else:
        counts = range(1, COMPONENTS + 1)
        models = [GaussianMixture(count, n_init=starts, random_state=seed).fit(x) for count in counts]
    bic, model = min(((model.bic(x), model) for model in models), key=lambda pair: pair[0])
    density = torch.from_numpy(model.score_samples(x))
    dense = (density >= density.sort().values[int(FRACTION * len(z))]).nonzero()
    return ordered[dense[0]].item(), ordered[dense[-1]].item(), model.n_components, bic


def _from_our_starts(z: Tensor) -> list[Any]:
    cuts = torch.tensor([[0, len(z)]])
    models = [_fitted(z, cuts[0].tolist())]
    while len(models) < COMPONENTS:
        parts = list(itertools.pairwise(cuts[0].tolist()))
        divisible = [cluster for cluster, (a, b) in enumerate(parts) if z[a] < z[b - 1]]
        starts = [reference_mixture._kmeans(z[None], cuts, cluster) for cluster in divisible]
        fits = [_fitted(z, start[0].tolist()) for start in starts]
        best = max(range(len(fits)), key=lambda place: fits[place].score(z[:, None].numpy()))
        cuts = starts[best]
        models.append(fits[best])
    return models


def _fitted(z: Tensor, cuts: list[int]) -> Any:
    from sklearn.mixture import GaussianMixture

    parts = [z[a:b] for a, b in itertools.pairwise(cuts)]
    model = GaussianMixture(
        len(parts),
        weights_init=torch.tensor([len(part) / len(z) for part in parts], dtype=torch.float64).numpy(),
        means_init=torch.stack([part.mean() for part in parts])[:, None].numpy(),
        precisions_init=torch.stack([1 / (part.var(correction=0) + 1e-6) for part in parts])[:, None, None].numpy(),
        init_params="random_from_data",  # of no effect beside the three above
        random_state=0,
    )
    return model.fit(z[:, None].numpy())


def agreement(first: Found, second: Found, scores: Tensor) -> dict[str, Any]:
    """Of the rows that both have: the share with the same number of components and bounds within 1 % of the row's
    range; and of the others, where both BICs are known, the shares in which that of either is the lower one."""
    count = min(len(first.bounds.low), len(second.bounds.low))
    ours, theirs = (MixtureBounds(*(part[:count].cpu() for part in found.bounds)) for found in (first, second))
    scores = scores[:count].cpu()
    allowed = 0.01 * (scores.amax(1) - scores.amin(1))
    near = ((ours.low - theirs.low).abs() <= allowed) & ((ours.high - theirs.high).abs() <= allowed)
    same = ours.components == theirs.components
    record = {"rows": count, "agree": (near & same).double().mean().item(), "same_K": same.double().mean().item()}
    record |= {"first_better": None, "second_better": None, "BIC_first_minus_second": None}
    if first.bic is not None and second.bic is not None:
        difference = first.bic[:count] - second.bic[:count]
        # 1e-3: what rounding leaves of a sum of some thousand logarithms is far below.
        record["first_better"] = ((difference < -1e-3) & ~(near & same)).double().mean().item()
        record["second_better"] = ((difference > 1e-3) & ~(near & same)).double().mean().item()
        record["BIC_first_minus_second"] = difference.mean().item()
    return record
