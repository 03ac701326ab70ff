"""References that are no plans: unstructured masks, dropped layers, rotated widths. In memory, for comparisons only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedModel


@dataclass(frozen=True)
class PrunedReference:
    """A pruned model in memory.

    Attributes:
        model: independent of the dense one.
        parameters_after: all parameters that are left: those that are there, or of a mask those that are not zero.
        prunable_after: of the attention and MLP matrices.
        note: what a reader of a table must know, e.g. "mask only: no smaller, no faster".
    """

    model: PreTrainedModel
    parameters_after: int
    prunable_after: int
    note: str


@dataclass(frozen=True)
class Reference:
    """How a reference is made.

    Attributes:
        prune: called as ``prune(model, tokens, sparsity, seed=0, scope="both")``; leaves `model` as it was found.
            Raises NirvanaError for a sparsity or scope that it cannot give.
        scopes: what it can prune.
    """

    prune: Callable[..., PrunedReference]
    scopes: tuple[str, ...] = ("both", "mlp")


#: Name -> reference.
REFERENCES: dict[str, Reference] = {}
