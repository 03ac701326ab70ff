"""Wanda-sp: Wanda (arXiv 2306.11695) on whole units, as the FLAP paper compares itself with (arXiv 2312.11983).

A channel c of the input of o_proj or down_proj gets the mean over output rows of |W_ic| sqrt(S_c), S_c = mean of x_c^2;
a unit gets the sum over its channels: a KV group over all its query heads. The same rate in every layer.

S is a mean over tokens where the code sums over a sequence: a common factor, without the sequence length in it. Left
out: the code averages over as many sequences as it was asked for, also those that it never loaded (a common factor
too), and feeds pruned outputs on to the next layer (`ActivationCriterion` says why that cannot be).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nirvana.architectures import Block
from nirvana.ops import group_saliency
from nirvana.saliency.kinds import ActivationCriterion, Part


def _score(block: Block, parts: Sequence[Part]) -> Tensor:
    output = parts[-1]
    columns = group_saliency(output.weight, None, axis=1, group=1, statistics="magnitude").double()
    return output.of_units(columns / output.weight.shape[0] * output.inputs.mean_square.sqrt())


CRITERION = ActivationCriterion(_score)
