"""CFSP (arXiv 2409.13199): relative sizes of a neuron's three weight vectors times the size of its activation.

With D hidden channels i, neurons j, S_j = mean over tokens of h_j^2, U_ij = |W_down,ij| sqrt(S_j):

    score_j = sqrt(S_j) / D * sum over i of [U_ij / sum_j U_ij + |W_up,ji| / sum_j |W_up,ji| + same of gate]

Each term is a neuron's share of all that its MLP writes to, or reads from, hidden channel i. Published: a rate for each
layer, from the angle by which it turns the residual stream (`nirvana.saliency.layers`); MLPs only.

Left out: the published code divides by sums over i instead and then averages over i, which makes each term 1/D for
every neuron, so that the score is sqrt(S_j) and no weight counts (`cfsp_faithful`). Its 1e4 in the layers' rates, which
ties them to the number of tokens, is taken off with means (`nirvana.published`).

To plan attention as well, KV groups get here the same formula, sums over their rows of q, k, v and columns of o, times
the root of the sum of S over their channels.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nirvana.architectures import Block
from nirvana.saliency.kinds import ActivationCriterion, Part, Published


def _score(block: Block, parts: Sequence[Part]) -> Tensor:
    *rows, output = parts
    squares = output.inputs.mean_square
    shares = output.of_units(_shares(output.weight.float().abs() * squares.sqrt().float()))
    for part in rows:
        shares += part.of_units(_shares(part.weight.float().abs().T))
    return output.of_units(squares).sqrt() * shares


def _shares(sizes: Tensor) -> Tensor:
    """Mean over rows of each entry's share of its row: ``[hidden, channels]`` -> float64 ``[channels]``."""
    totals = sizes.sum(1)
    # A hidden channel that nothing is written to or read from is shared by none.
    parts = totals.reciprocal().masked_fill(totals == 0, 0)
    return (parts @ sizes).double() / len(sizes)


CRITERION = ActivationCriterion(_score, measures_layers=True, published=Published("layer-ratios", scope="mlp"))
