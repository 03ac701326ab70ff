"""Second-order Taylor scores with the diagonal empirical Fisher: LLM-Pruner's `param_second` (arXiv 2305.11627).

Sum over a unit's weights of w^2 A, A = the mean over examples of g_n^2, g_n = the gradient of example n's own nll (the
published 1/2 is common to all). It costs one backward pass an example, whatever the micro-batch: squares of a batch's
summed gradient would let examples cancel, which is another statistic. Because w^2 A is the mean of (w g_n)^2, each
example adds to the scores and no buffer of the size of the weights exists.

Left out: the published fold of query heads (see llm_pruner).
"""

from __future__ import annotations

from torch import Tensor

from nirvana.architectures import Slice
from nirvana.ops import group_saliency
from nirvana.saliency.kinds import WeightCriterion
from nirvana.saliency.rivals.llm_pruner import PUBLISHED


def _second_order(weight: Tensor, gradient: Tensor | None, part: Slice, scores: Tensor) -> None:
    """Sum of (w g_n)^2 of one example."""
    if part.width:
        group_saliency(weight, gradient, axis=part.axis, group=part.unit, statistics="fisher", out=scores)


CRITERION = WeightCriterion(_second_order, objective="nll", per_example=True, published=PUBLISHED)
