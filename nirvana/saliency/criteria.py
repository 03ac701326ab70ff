"""How weights and gradients become scores. A criterion is one entry of CRITERIA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from nirvana.architectures import Slice
from nirvana.ops import group_saliency


@dataclass(frozen=True)
class Criterion:
    """A rule that adds one tensor's share to the scores of its units.

    Attributes:
        add: called with (weight, gradient or None, slice, scores fp32 ``[units]``); adds to the scores in place.
        needs_gradients: whether the objective is differentiated at all.
    """

    add: Callable[[Tensor, Tensor | None, Slice, Tensor], None]
    needs_gradients: bool = False


def _nirvana(weight: Tensor, gradient: Tensor | None, part: Slice, scores: Tensor) -> None:
    """Sum of |gradient x weight|, arXiv 2509.14230."""
    group_saliency(weight, gradient, axis=part.axis, group=part.unit, out=scores)


def _magnitude(weight: Tensor, gradient: Tensor | None, part: Slice, scores: Tensor) -> None:
    """Sum of |weight|: the baseline that needs no data."""
    group_saliency(weight, None, axis=part.axis, group=part.unit, statistics="magnitude", out=scores)


CRITERIA = {
    "nirvana": Criterion(_nirvana, needs_gradients=True),
    "magnitude": Criterion(_magnitude),
}

#: Needs neither weights nor gradients; `score` draws it from the seed.
RANDOM = "random"
