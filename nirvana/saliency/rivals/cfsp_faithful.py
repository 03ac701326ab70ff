"""CFSP (arXiv 2409.13199) as its published code computes it: the root of the mean square of a neuron's activation.

The code divides |W_down| sqrt(S), |W_up|^T and |W_gate|^T (hidden channels x neurons) by their sums over hidden
channels, and then takes the mean of their sum over those same channels. So each of the three terms is 1/D for every
neuron, D = hidden size, and what is left is

    score_j = 3 / D * sqrt(S_j):

no weight counts (a neuron whose weights are all 0, for which the code divides by 0, included). For the formula of the
paper, the layers' rates and KV groups, which get 4 / D times the root of the sum of S over their channels, see `cfsp`.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nirvana.architectures import Block
from nirvana.saliency.kinds import ActivationCriterion, Part
from nirvana.saliency.rivals import cfsp


def _score(block: Block, parts: Sequence[Part]) -> Tensor:
    output = parts[-1]
    return output.of_units(output.inputs.mean_square).sqrt() * (len(parts) / output.slice.width)


CRITERION = ActivationCriterion(_score, measures_layers=True, published=cfsp.CRITERION.published)
