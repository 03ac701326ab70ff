"""How weights, activations and gradients become scores. A criterion is one entry of CRITERIA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from nirvana.architectures import Slice
from nirvana.ops import group_saliency


@dataclass(frozen=True)
class WeightCriterion:
    """A rule that adds one tensor's share to the scores of its units.

    Attributes:
        add: called with (weight, gradient or None, slice, scores fp32 ``[units]``); adds to the scores in place.
        objective: what is differentiated unless another is asked for; empty for a rule that needs no gradients.
    """

    add: Callable[[Tensor, Tensor | None, Slice, Tensor], None]
    objective: str = ""


@dataclass(frozen=True)
class MaskCriterion:
    """A rule that adds the share of some examples to the scores of a block's units.

    Attributes:
        add: called with (m fp32 ``[examples, units]``, scores fp32 ``[units]``); adds to the scores in place. m_nj is
            the derivative of the objective by a mask on unit j in example n (`nirvana.saliency.masks`).
        objective: what is differentiated unless another is asked for.
    """

    add: Callable[[Tensor, Tensor], None]
    objective: str


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


CRITERIA: dict[str, WeightCriterion | MaskCriterion] = {
    "nirvana": WeightCriterion(_nirvana, objective="max-logit"),
    "magnitude": WeightCriterion(_magnitude),
    "mask-fisher": MaskCriterion(_mask_fisher, objective="nll"),
    "mask-abs": MaskCriterion(_mask_abs, objective="nll"),
}

#: Needs neither weights nor gradients; `score` draws it from the seed.
RANDOM = "random"
