"""LLM-Pruner (arXiv 2305.11627) as its published code adds query heads to key/value heads.

The code folds the channels of q and o onto those of k by their index modulo the number of key channels. Heads are whole
numbers of channels, so that KV group k of K gets the scores of query heads k, k + K, k + 2K, ..., while heads kG ..
kG + G - 1 (G = query heads of a group) are removed with it. Without shared key/value heads this is `llm_pruner`.
"""

from __future__ import annotations

from torch import Tensor

from nirvana.architectures import Slice
from nirvana.ops import group_saliency
from nirvana.saliency.kinds import WeightCriterion
from nirvana.saliency.rivals import llm_pruner


def _elements(weight: Tensor, gradient: Tensor | None, part: Slice, scores: Tensor) -> None:
    """Sum of |w g| of each head; head h to group h mod K. Biases are not scored."""
    if part.width:
        heads = group_saliency(weight, gradient, axis=part.axis, group=part.unit // part.heads)
        scores += heads.view(part.heads, len(scores)).sum(0)


CRITERION = WeightCriterion(_elements, objective="nll", published=llm_pruner.PUBLISHED)
