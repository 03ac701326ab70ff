"""What a criterion can be: a rule on weights and one or two gradients, on derivatives by unit masks, on activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from nirvana.architectures import Block, Slice
from nirvana.saliency.activations import InputStatistics


@dataclass(frozen=True)
class Published:
    """What a paper does with its scores, where that differs from nirvana's allocation (`nirvana.published`).

    Attributes:
        allocation: "global" (all layers ranked together, attention and MLP apart), "uniform" (the same rate in every
            layer), "joint" (all units of both kinds ranked together, a unit weighing its parameters) or "layer-ratios"
            (a rate for each layer, from the saliency's ``layer_importance``).
        scope: "both" or "mlp": what the paper prunes. Scores are there for both kinds whatever this says.
        spared: fractions of the layers, first and last, that stay whole.
        repair: "none" or "bias": what the paper does to kept weights, as `nirvana.repair` names it.
    """

    allocation: str = "uniform"
    scope: str = "both"
    spared: tuple[float, float] = (0.0, 0.0)
    repair: str = "none"


#: nirvana's own: ranked by kind, with gamma.
GLOBAL = Published("global")


@dataclass(frozen=True)
class WeightCriterion:
    """A rule that adds one tensor's share to the scores of its units.

    Attributes:
        add: called with (weight, gradient or None, slice, scores fp32 ``[units]``); adds to the scores in place.
        objective: what is differentiated unless another is asked for; empty for a rule that needs no gradients.
        per_example: the gradient is that of one example at a time, by the example's own objective, and scores are the
            mean over examples. One backward pass an example, whatever the micro-batch.
        published: what the paper does with the scores.
    """

    add: Callable[[Tensor, Tensor | None, Slice, Tensor], None]
    objective: str = ""
    per_example: bool = False
    published: Published = GLOBAL

    @property
    def reads_tokens(self) -> bool:
        return bool(self.objective)


@dataclass(frozen=True)
class MaskCriterion:
    """A rule that adds the share of some examples to the scores of a block's units.

    Attributes:
        add: called with (m fp32 ``[examples, units]``, scores fp32 ``[units]``); adds to the scores in place. m_nj is
            the derivative of the objective by a mask on unit j in example n (`nirvana.saliency.masks`).
        objective: what is differentiated unless another is asked for.
        published: what the paper does with the scores.
    """

    add: Callable[[Tensor, Tensor], None]
    objective: str
    published: Published = GLOBAL

    @property
    def reads_tokens(self) -> bool:
        return True


@dataclass(frozen=True)
class PairCriterion:
    """A rule on scores of single weights, made of their gradients of the features and of the loss (`saliency.afr`).

    Attributes:
        aggregate: called with the scores of a block's weights, fp32 ``[units, m]``; returns ``[units]``, larger =
            keep, in any floating-point type. It leaves the scores as they are.
        signed: whether the two terms of a weight keep their sign.
        winsorised: whether each unit's outliers are clipped first.
        objective: the loss, unless another is asked for.
        published: what the paper does with the scores.
    """

    aggregate: Callable[[Tensor], Tensor]
    signed: bool = True
    winsorised: bool = False
    objective: str = "nll"
    published: Published = GLOBAL

    @property
    def reads_tokens(self) -> bool:
        return True


class Part(NamedTuple):
    """One matrix of a block, and what it reads.

    Attributes:
        slice: which rows or columns belong to a unit.
        weight: ``[out, in]``.
        inputs: statistics of its input; None for q, k, v, gate and up unless the criterion asks for them.
    """

    slice: Slice
    weight: Tensor
    inputs: InputStatistics | None

    def of_units(self, values: Tensor) -> Tensor:
        """Sums over each unit's rows or columns: ``[units * slice.unit]`` -> ``[units]``."""
        return values.view(-1, self.slice.unit).sum(1)


@dataclass(frozen=True)
class ActivationCriterion:
    """A rule on weights and on statistics of what they read, from one forward pass of the dense model.

    Nothing is pruned meanwhile: every layer reads what it reads in the dense model. Some papers feed the output of
    pruned layers on to the next one; a saliency that any sparsity can be planned from cannot.

    Attributes:
        score: called with (block, its matrices: those with rows of units first, the output layer last); returns
            ``[units]``, larger = keep, in any floating-point type.
        finish: called with block name -> scores of all blocks; returns them as they are to be compared.
        reads_inputs: whether `score` needs statistics of the inputs of q, k, v, gate and up; those of o and down are
            always there.
        measures_layers: whether the saliency's settings get ``layer_importance`` (`nirvana.saliency.layers`).
        published: what the paper does with the scores.
    """

    score: Callable[[Block, Sequence[Part]], Tensor]
    finish: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict
    reads_inputs: bool = False
    measures_layers: bool = False
    published: Published = Published()

    #: Nothing is differentiated.
    objective = ""

    @property
    def reads_tokens(self) -> bool:
        return True


Criterion = WeightCriterion | MaskCriterion | PairCriterion | ActivationCriterion
