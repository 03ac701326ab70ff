"""Masks of single weights: how many go, which, and what is left. Nothing becomes smaller or faster by them."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nirvana.architectures import Architecture, Block, Slice
from nirvana.errors import NirvanaError
from nirvana.references.base import PrunedReference
from nirvana.saliency.activations import matrices

SCOPES = ("both", "mlp")
NOTE = "mask only: no smaller, no faster"

#: How far from one half the fraction of weights that 2:4 is asked to remove may be.
HALF = 5e-4


def blocks_in(architecture: Architecture, scope: str) -> tuple[Block, ...]:
    """The blocks that a scope prunes."""
    return tuple(block for block in architecture.blocks if scope == "both" or not block.is_attention)


def masked_matrices(architecture: Architecture, scope: str) -> Iterator[Slice]:
    """The matrices that a scope prunes."""
    for block in blocks_in(architecture, scope):
        yield from matrices(block)


def rate_in(architecture: Architecture, sparsity: float, scope: str) -> float:
    """The fraction of the scope's weights that goes, so that `sparsity` of all prunable ones do.

    Raises:
        NirvanaError: the scope has too few weights.
    """
    every = architecture.prunable_parameters
    own = sum(block.size * block.parameters_per_unit for block in blocks_in(architecture, scope))
    if sparsity * every >= own:
        raise NirvanaError(
            f"--sparsity {sparsity} is impossible with --scope {scope}, which has {own / every:.1%} of the prunable "
            "parameters; use --scope both"
        )
    return sparsity * every / own


def check_two_of_four(model: PreTrainedModel, architecture: Architecture, sparsity: float, scope: str) -> None:
    """Raise NirvanaError unless two of every four weights along the inputs are what `sparsity` asks for."""
    own = sum(block.size * block.parameters_per_unit for block in blocks_in(architecture, scope))
    half = own / architecture.prunable_parameters / 2
    if abs(sparsity - half) > HALF:
        raise NirvanaError(
            f"--sparsity {sparsity}: 2:4 with --scope {scope} removes {half:.4f} of the prunable parameters; give that"
        )
    for part in masked_matrices(architecture, scope):
        width = model.get_parameter(part.tensor).shape[1]
        if width % 4:
            raise NirvanaError(f"2:4 is impossible: {part.tensor} has {width} inputs, which is no multiple of 4")


def lowest(scores: Tensor, count: int) -> Tensor:
    """Bool, as `scores`: exactly the `count` lowest; of equals the first."""
    gone = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    gone[torch.argsort(scores.flatten(), stable=True)[:count]] = True
    return gone.view_as(scores)


def lowest_in_rows(scores: Tensor, rate: float) -> Tensor:
    """Bool, as `scores` ``[rows, columns]``: the lowest of each row; of equals the first.

    Where `rate` of a row is no whole number, rows take turns in losing one more: any two differ by at most one, and
    over the matrix as many go as `rate` says, to the nearest weight.
    """
    rows, columns = scores.shape
    edges = (torch.arange(rows + 1, dtype=torch.float64, device=scores.device) * (rate * columns)).round().long()
    order = torch.argsort(scores, dim=1, stable=True)
    ranks = torch.arange(columns, device=scores.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, ranks) < edges.diff()[:, None]


def lowest_of_four(scores: Tensor) -> Tensor:
    """Bool, as `scores` ``[rows, columns]``: the two lowest of each four neighbours in a row; of equals the first."""
    return lowest_in_rows(scores.reshape(-1, 4), 0.5).view_as(scores)


def mask_result(model: PreTrainedModel, architecture: Architecture, removed: int) -> PrunedReference:
    """`model` is the masked copy, `architecture` that of the dense one."""
    return PrunedReference(model, architecture.parameters - removed, architecture.prunable_parameters - removed, NOTE)


def independent(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in evaluation mode that shares no memory with `model`."""
    return copy.deepcopy(model).eval()
