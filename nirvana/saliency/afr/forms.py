"""AFR's scores of units: four ways of making one score of the m scores S of a unit's weights.

* ``mean``: (1/m) sum |S|, S of absolute terms: the unstructured criterion's.
* ``abs``: |(1/m) sum S|, S of signed terms: weights that pull one way keep their weight, mixed signs cancel.
* ``gmm``: the unit's signed scores are winsorised (`nirvana.ops.mixture_bounds`: up to 5 Gaussians, by BIC; the 2 % of
  lowest density, at the ends), then (1/m) sum |S|.
* ``abs-gmm``, the paper's proposal: winsorised, then |(1/m) sum S|.

The m weights of a neuron are its rows of gate and up and its column of down; those of a KV group its rows of q, k and
v and its columns of o. Biases are not counted. Published: MLPs alone, the same rate in every layer; KV groups get the
same formulas here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nirvana.saliency.kinds import PairCriterion, Published

#: Units whose float64 sums are taken at a time.
_AT_ONCE = 1024


def _size(scores: Tensor) -> Tensor:
    return _mean(scores, torch.abs)


def _net(scores: Tensor) -> Tensor:
    return _mean(scores).abs()


def _mean(scores: Tensor, change=lambda rows: rows) -> Tensor:
    """fp32 ``[units, m]`` -> float64 ``[units]``: sums of signed scores nearly vanish."""
    return torch.cat([change(rows.double()).mean(1) for rows in scores.split(_AT_ONCE)])


PUBLISHED = Published("uniform", scope="mlp")
MEAN = PairCriterion(_size, signed=False, published=PUBLISHED)
ABS = PairCriterion(_net, published=PUBLISHED)
GMM = PairCriterion(_size, winsorised=True, published=PUBLISHED)
ABS_GMM = PairCriterion(_net, winsorised=True, published=PUBLISHED)

#: Name of the criterion -> its rule.
FORMS = {"afr-mean": MEAN, "afr-abs": ABS, "afr-gmm": GMM, "afr-abs-gmm": ABS_GMM}
