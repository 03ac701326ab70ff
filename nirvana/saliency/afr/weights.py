"""Unstructured AFR: a score of each single weight, for masks that remove weights one by one."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedModel

from nirvana.architectures import Architecture, Slice
from nirvana.saliency.afr.gradients import walk_pairs
from nirvana.saliency.afr.terms import finite_terms
from nirvana.saliency.finite import Finite, explained
from nirvana.saliency.objectives import OBJECTIVES
from nirvana.saliency.passes import check_request


def weight_scores(
    model: PreTrainedModel,
    architecture: Architecture,
    tokens: Tensor,
    reduce: Callable[[str, Slice, Tensor], None],
    *,
    objective: str = "nll",
    attention_mask: Tensor | None = None,
    micro_batch: int | None = None,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Hand each matrix of attention and MLPs to `reduce`, with Z(|dF/dw w|) + Z(|dL/dw w|) of its weights.

    Args:
        model: in any floating-point type; it is left as it was found.
        architecture: of the model (`nirvana.describe`).
        tokens: calibration batch, int64 ``[examples, tokens]``.
        reduce: called with (tensor name, slice, scores fp32 ``[out, in]`` on the model's device), once a matrix, from
            the last layer to the first; larger = keep. It may keep and change the scores.
        objective: L: "nll" as published, or "max-logit".
        attention_mask: ``[examples, tokens]``, 0 where a short example is padded.
        micro_batch: examples per forward pass; None takes all at once. Memory: see `walk_pairs`.
        progress: called as often as the model has tensors that are scored.

    Raises:
        NirvanaError: bad input as for `nirvana.score`.
    """
    check_request(model, objective, tokens, micro_batch)

    handed: set[str] = set()

    def walked(finite: Finite, progress: Callable[[], None]) -> None:
        def found(block: str, part: Slice, weight: Tensor, features: Tensor, loss: Tensor) -> None:
            terms = finite_terms(model, finite, part, weight, features, loss, signed=False)
            # A second walk only searches for what was not finite in the first.
            if part.tensor not in handed:
                handed.add(part.tensor)
                reduce(part.tensor, part, terms)

        asked = (OBJECTIVES[objective], tokens, attention_mask, micro_batch, found, progress)
        walk_pairs(model, architecture, *asked, finite=finite)

    explained(model, walked, progress)
