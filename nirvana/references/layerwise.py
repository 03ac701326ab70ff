"""Mask a model layer by layer, where each layer reads what the masked layers before it hand on."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from nirvana.architectures import Block
from nirvana.architectures.inputs import model_inputs
from nirvana.diagnosis import why_not_finite
from nirvana.errors import NirvanaError
from nirvana.patching import evaluation_mode, forward_replaced, head_hands_on
from nirvana.references.base import PrunedReference, check_request
from nirvana.references.masks import (
    SCOPES,
    blocks_in,
    check_two_of_four,
    independent,
    mask_result,
    rate_in,
)
from nirvana.saliency.activations import readers
from nirvana.saliency.layers import layer_of


class Statistics(Protocol):
    """What is collected of the input of a linear layer; `add` takes ``[tokens, channels]``."""

    def add(self, x: Tensor) -> None: ...


Collect = Callable[[int, torch.device], Statistics]

#: Removes weights of a linear layer, changing it in place: called with the layer, the statistics of its input and the
#: fraction that goes, None for two of every four; returns the mask of what is gone, bool ``[out, in]``.
Refit = Callable[[nn.Linear, Any, "float | None"], Tensor]


def prune_layer_by_layer(
    model: PreTrainedModel,
    tokens: Tensor,
    sparsity: float,
    scope: str,
    two_of_four: bool,
    collect: Collect,
    refit: Refit,
) -> PrunedReference:
    """Mask the matrices of each layer by statistics of what they read, in one pass through the model.

    Each layer runs twice: with its own weights, to collect, and masked, for the layers after it. So within a layer the
    inputs of o and down are those of its dense q, k, v, gate and up, as published for Wanda and SparseGPT.

    Args:
        tokens: int64 ``[examples, tokens]``; the activations of one layer on all of it are in memory.
        collect: makes the statistics of one input, from its channels and device.
        refit: see `Refit`.

    Raises:
        NirvanaError: arguments out of range, or activations that are not finite.
    """
    architecture = check_request(model, tokens, sparsity, scope, SCOPES)
    if two_of_four:
        check_two_of_four(model, architecture, sparsity, scope)
    rate = None if two_of_four else rate_in(architecture, sparsity, scope)
    small = independent(model)
    names = [name for name, module in small.named_modules() if isinstance(module, GradientCheckpointingLayer)]
    layers: dict[str, list[Block]] = {name: [] for name in names}
    for block in blocks_in(architecture, scope):
        layers[layer_of(block.name, names)].append(block)
    removed = 0

    def masked(blocks: Sequence[Block], forward: Callable, *arguments: Any, **keywords: Any) -> Any:
        """Stands in for the forward of a layer."""
        nonlocal removed
        groups = [[_linear(small, part.tensor) for part in parts] for parts in _groups(small, blocks)]
        found = [collect(group[0].in_features, group[0].weight.device) for group in groups]
        with contextlib.ExitStack() as stack:
            for group, statistics in zip(groups, found, strict=True):
                hook = functools.partial(_collect, small, statistics)
                stack.callback(group[0].register_forward_pre_hook(hook).remove)
            forward(*arguments, **keywords)
        for group, statistics in zip(groups, found, strict=True):
            for linear in group:
                removed += int(refit(linear, statistics, rate).sum())
        return forward(*arguments, **keywords)

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluation_mode(small))
        stack.enter_context(head_hands_on(small))  # no logits are needed
        for name, blocks in layers.items():
            wrap = functools.partial(functools.partial, masked, blocks)
            stack.enter_context(forward_replaced(small.get_submodule(name), wrap))
        small(**model_inputs(small, tokens).arguments)
    return mask_result(small, architecture, removed)


def _groups(model: PreTrainedModel, blocks: Sequence[Block]) -> list:
    """Matrices that read one tensor."""
    return [parts for block in blocks for parts, _ in readers(model, block, reads_inputs=True)]


def _linear(model: PreTrainedModel, tensor: str) -> nn.Linear:
    return model.get_submodule(tensor.removesuffix(".weight"))


def _collect(model: PreTrainedModel, statistics: Statistics, module: nn.Module, arguments: tuple) -> None:
    x = arguments[0].flatten(0, -2)
    if not torch.isfinite(x).all():
        raise NirvanaError(why_not_finite(model))
    statistics.add(x)
