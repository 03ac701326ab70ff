"""What a reference is: a model in memory, pruned by a method that makes no nirvana plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from nirvana.architectures import Architecture, describe
from nirvana.calibration.batch import check_tokens
from nirvana.errors import NirvanaError
from nirvana.widths import WidthRule


@dataclass(frozen=True)
class PrunedReference:
    """The result of a reference method.

    Attributes:
        model: in memory, in evaluation mode; it shares nothing with the dense one.
        parameters_after: all parameters, tied ones once; weights that a mask removed are not counted, and what a
            method adds is.
        prunable_after: of these, matrices of decoder (and encoder) layers.
        note: what the figures alone do not say, in one line.
    """

    model: PreTrainedModel
    parameters_after: int
    prunable_after: int
    note: str


@dataclass(frozen=True)
class Reference:
    """A method for comparison.

    Attributes:
        prune: called as ``prune(model, tokens, sparsity, *, seed=0, scope="both")`` with the dense model, which is left
            as it was found, a calibration batch int64 ``[examples, tokens]`` and the fraction of the prunable
            parameters (attention + MLP matrices) that goes, whatever the scope. It raises NirvanaError where the
            method cannot do what is asked.
        scopes: what it can prune: "both", "mlp".
    """

    prune: Callable[..., PrunedReference]
    scopes: tuple[str, ...] = ("both", "mlp")


def check_request(
    model: PreTrainedModel, tokens: Tensor | None, sparsity: float, scope: str, scopes: tuple[str, ...]
) -> Architecture:
    """What can be pruned in `model`.

    Args:
        tokens: None for a method that reads none.

    Raises:
        NirvanaError: an unknown family, tokens that do not fit it, or an argument out of range.
    """
    architecture = describe(model)
    if tokens is not None:
        check_tokens(tokens, model.config)
    WidthRule(sparsity)  # checks it
    if scope not in scopes:
        raise NirvanaError(f"--scope {scope!r} is not possible with this reference; it prunes {' or '.join(scopes)}")
    return architecture
