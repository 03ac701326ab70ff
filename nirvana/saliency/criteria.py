'''The registry of criteria. A new criterion is one file and one line.

The file, for example nirvana/saliency/rivals/peak.py, scores a unit by the largest weight that goes with it::

    from nirvana.saliency.kinds import WeightCriterion


    def _peak(weight, gradient, part, scores):
        """Rows (axis 0) or columns of each unit side by side, then the largest |w|."""
        units = weight.reshape(len(scores), -1) if part.axis == 0 else weight.T.reshape(len(scores), -1)
        scores.copy_(scores.maximum(units.abs().amax(1)))


    CRITERION = WeightCriterion(_peak)

The line, in `CRITERIA` below (or, in a program of your own, ``CRITERIA["peak"] = ...`` before `nirvana.score`)::

    "peak": peak.CRITERION,

From then on ``nirvana score --criterion peak`` and every other command take it, also in sums like nirvana+peak. A rule
that needs gradients says which objective it differentiates, ``WeightCriterion(_peak, objective="nll")``, and gets them
in `gradient`; rules on unit masks and on activations are the other kinds in `nirvana.saliency.kinds`.
'''

from __future__ import annotations

from torch import Tensor

from nirvana.architectures import Slice
from nirvana.ops import group_saliency
from nirvana.saliency.afr import FORMS
from nirvana.saliency.kinds import Criterion, MaskCriterion, WeightCriterion
from nirvana.saliency.rivals import (
    cfsp,
    cfsp_faithful,
    flap,
    llm_pruner,
    llm_pruner_faithful,
    lorap,
    magnitude_l2,
    taylor2,
    wanda_sp,
)


def _nirvana(weight: Tensor, gradient: Tensor | None, part: Slice, scores: Tensor) -> None:
    """Sum of |gradient x weight|, arXiv 2509.14230."""
    group_saliency(weight, gradient, axis=part.axis, group=part.unit, out=scores)


def _magnitude(weight: Tensor, gradient: Tensor | None, part: Slice, scores: Tensor) -> None:
    """Sum of |weight|: the baseline that needs no data."""
    group_saliency(weight, None, axis=part.axis, group=part.unit, statistics="magnitude", out=scores)


def _mask_fisher(masks: Tensor, scores: Tensor) -> None:
    """Sum over examples of m_nj^2: the diagonal of the empirical Fisher information of the masks, arXiv 2204.09656."""
    scores += masks.square().sum(0)


def _mask_abs(masks: Tensor, scores: Tensor) -> None:
    """Sum over examples of |m_nj|."""
    scores += masks.abs().sum(0)


CRITERIA: dict[str, Criterion] = {
    "nirvana": WeightCriterion(_nirvana, objective="max-logit"),
    "magnitude": WeightCriterion(_magnitude),
    "mask-fisher": MaskCriterion(_mask_fisher, objective="nll"),
    "mask-abs": MaskCriterion(_mask_abs, objective="nll"),
    "magnitude-l2": magnitude_l2.CRITERION,
    "llm-pruner": llm_pruner.ELEMENTS,
    "llm-pruner-vector": llm_pruner.VECTORS,
    "llm-pruner-faithful": llm_pruner_faithful.CRITERION,
    "taylor2": taylor2.CRITERION,
    "wanda-sp": wanda_sp.CRITERION,
    "flap": flap.CRITERION,
    "cfsp": cfsp.CRITERION,
    "cfsp-faithful": cfsp_faithful.CRITERION,
    "lorap": lorap.CRITERION,
    **FORMS,
}

#: Needs neither weights nor gradients; `score` draws it from the seed.
RANDOM = "random"
