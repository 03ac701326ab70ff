"""LLM-Pruner (arXiv 2305.11627): first-order Taylor scores, of elements or of whole rows and columns.

Scores of a unit are sums over the rows of q, k, v (gate, up) and the columns of o (down) that go with it; biases are
not scored. Published: nll of the batch, one backward pass; the same rate in every layer but the first 4 and the last 2
of 32, which stay whole.

Left out: the published code adds query channel r to key channel r mod (K d) where query heads share key/value heads, so
that group k gets the scores of heads k, k + K, k + 2K, ... while heads kG .. kG + G - 1 are removed with it (that is
`llm_pruner_faithful`). Here a group's score is that of the heads that go. (`param_mix` adds a second-order term: see
taylor2.)
"""

from __future__ import annotations

from torch import Tensor

from nirvana.architectures import Slice
from nirvana.ops import group_saliency
from nirvana.saliency.kinds import Published, WeightCriterion

PUBLISHED = Published("uniform", spared=(4 / 32, 2 / 32))


def _elements(weight: Tensor, gradient: Tensor | None, part: Slice, scores: Tensor) -> None:
    """Sum of |w g| (`param_first`). With one objective, nirvana's statistic without biases."""
    if part.width:
        group_saliency(weight, gradient, axis=part.axis, group=part.unit, out=scores)


def _vectors(weight: Tensor, gradient: Tensor | None, part: Slice, scores: Tensor) -> None:
    """Sum over the unit's rows or columns of |the sum of w g| (`vectorize`): signs cancel inside each."""
    if part.width:
        each = group_saliency(weight, gradient, axis=part.axis, group=1, statistics="signed")
        scores += each.abs().view(-1, part.unit).sum(1)


ELEMENTS = WeightCriterion(_elements, objective="nll", published=PUBLISHED)
VECTORS = WeightCriterion(_vectors, objective="nll", published=PUBLISHED)
