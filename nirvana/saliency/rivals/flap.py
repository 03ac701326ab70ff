"""FLAP (arXiv 2312.11983): fluctuation of the inputs of o_proj and down_proj, weighted by their weights (WIFV).

A channel gets its variance over the calibration tokens times |W[:, c]|_2^2; in attention the square of that, as
published. Scores become comparable between layers as z-scores over the channels of each layer (AL-AM); a unit gets the
mean over its channels. Published: all units of both kinds ranked together, a unit weighing its parameters, and the mean
of what is lost added to the output layers' biases.

z-scores are shifted by one constant for the whole model, so that the lowest is 0: order and distances stay, and
fractions of kept saliency mean something (they depend on that zero, so compare them within one saliency only).

Left out: the published running variance takes the mean after its update for the one before it, adds nothing for the
first sequence and so depends on the order of examples; here it is the variance about the mean of all tokens. Head size
128, one mask for q, k and v, and the weight 512/3 of a head, which is wrong with grouped queries, are not written in
(`nirvana.published` counts parameters).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from nirvana.architectures import Block
from nirvana.ops import group_saliency
from nirvana.saliency.kinds import ActivationCriterion, Part, Published


def _score(block: Block, parts: Sequence[Part]) -> Tensor:
    output = parts[-1]
    norms = group_saliency(output.weight, None, axis=1, group=1, statistics="squared").double()
    metric = output.inputs.variance * norms
    if block.is_attention:
        metric = metric.square()
    return output.of_units(_standardised(metric)) / output.slice.unit


def _standardised(values: Tensor) -> Tensor:
    centred = values - values.mean()
    deviation = (centred.square().sum() / max(len(values) - 1, 1)).sqrt()
    # All equal (one channel, say): none stands out.
    return centred / deviation.masked_fill(deviation == 0, 1)


def _shifted(scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    lowest = min(float(values.min()) for values in scores.values())
    return {block: values - lowest for block, values in scores.items()}


CRITERION = ActivationCriterion(_score, finish=_shifted, published=Published("joint", repair="bias"))
