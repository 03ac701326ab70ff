"""Change a model for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import nn


@contextlib.contextmanager
def forward_replaced(module: nn.Module, wrap: Callable[[Callable], Callable]) -> Iterator[None]:
    """Inside, `module.forward` is ``wrap(module.forward)``. A forward that others put on the instance comes back."""
    own = module.__dict__.get("forward")
    module.forward = wrap(module.forward)
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def head_hands_on(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Inside, the head returns its input: the model's logits are hidden states, scaled as its family does it."""
    return forward_replaced(model.get_output_embeddings(), lambda forward: lambda hidden: hidden)


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Inside, dropout is off; afterwards each module is in the mode that it was in."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextlib.contextmanager
def parameters_as(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside, floating-point parameters are of `dtype`; buffers stay, as when a checkpoint is loaded in that type.

    Nothing is copied where they are of that type already. What is written to copies inside is lost.
    """
    own = {p: p.data for p in model.parameters() if p.is_floating_point() and p.dtype != dtype}
    try:
        for parameter, data in own.items():
            parameter.data = data.to(dtype)
        yield
    finally:
        for parameter, data in own.items():
            parameter.data = data
