"""Both gradients of each weight: of the features' singular values (ReFer) and of the loss (SNIP)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedModel

from nirvana.architectures import Architecture, Slice
from nirvana.saliency.activations import matrices
from nirvana.saliency.afr.refer import walk_features
from nirvana.saliency.finite import Finite
from nirvana.saliency.objectives import Objective
from nirvana.saliency.steps import rescaled
from nirvana.saliency.walk import walk

#: (block name, slice, weight, dF/dw, dL/dw)
ReducePair = Callable[[str, Slice, Tensor, Tensor, Tensor], None]


def walk_pairs(
    model: PreTrainedModel,
    architecture: Architecture,
    objective: Objective,
    tokens: Tensor,
    attention_mask: Tensor | None,
    micro_batch: int | None,
    reduce: ReducePair,
    progress: Callable[[], None] = lambda: None,
    *,
    finite: Finite | None = None,
    gradient_checkpointing: bool | None = None,
) -> None:
    """Hand each matrix with both gradients to `reduce`, once, over the whole batch; biases are left out.

    Two walks: the first one's gradients wait for the second's. One forward pass with two backward passes would keep as
    much, and save one of eight parts of the time (forward 1, recomputation 1, backward 2, twice; ReFer's walk has no
    vocabulary head to begin with).

    Memory besides that of `walk`: the prunable weights once more, in their own type, or 4 bytes a weight with
    micro-batches, for which `walk` itself takes 4 bytes more: 8 in all.

    Args:
        objective: L.
        reduce: called with (block name, slice, weight, dF/dw, dL/dw).
        progress: called as often as the model has tensors that are scored.
        model, architecture, tokens, attention_mask, micro_batch, finite, gradient_checkpointing: see `walk`.

    Raises:
        NirvanaError: something is not finite; the message names the parameter.
    """
    waiting: dict[str, Tensor] = {}
    half = rescaled(progress, 2, 1)
    options = {"finite": finite, "gradient_checkpointing": gradient_checkpointing}

    def keep(block: str, part: Slice, weight: Tensor, gradient: Tensor) -> None:
        if part.width:
            waiting[part.tensor] = gradient

    def pair(block: str, part: Slice, weight: Tensor, gradient: Tensor) -> None:
        if part.width:
            reduce(block, part, weight, waiting.pop(part.tensor), gradient)

    kept = sum(model.get_parameter(part.tensor).nbytes for block in architecture.blocks for part in matrices(block))
    walk_features(model, architecture, tokens, attention_mask, micro_batch, keep, half, reserve=kept, **options)
    walk(model, architecture, objective, tokens, attention_mask, micro_batch, pair, half, **options)
