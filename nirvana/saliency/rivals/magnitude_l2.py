"""Group magnitude: the sum of w^2 over all matrices of a unit (Torch-Pruning, arXiv 2301.12900; LLM-Pruner's l2).

Published as a mean over q, k, v, o (gate, up, down) and divided by the layer's mean, both of which leave the order
within a layer as it is; the same rate in every layer. Biases are not scored.

Left out: the published fold of query heads (see llm_pruner).
"""

from __future__ import annotations

from torch import Tensor

from nirvana.architectures import Slice
from nirvana.ops import group_saliency
from nirvana.saliency.kinds import Published, WeightCriterion


def _squares(weight: Tensor, gradient: Tensor | None, part: Slice, scores: Tensor) -> None:
    if part.width:
        group_saliency(weight, None, axis=part.axis, group=part.unit, statistics="squared", out=scores)


CRITERION = WeightCriterion(_squares, published=Published("uniform"))
