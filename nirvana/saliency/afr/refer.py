"""ReFer: the gradient of the mean singular values of all layers' features.

F is the sum over layers, and the mean over examples, of the mean of the singular values of X ``[tokens, hidden]``,
what the layer hands on for the example's real tokens. Its derivative by X = U S V^T is U V^T over the number of
singular values, min(tokens, hidden), and over that of examples: a fixed cotangent, which is added to the gradient of
each layer's output while one backward pass goes by. Nothing is differentiated through a decomposition.

Each example has a matrix of its own. One matrix of all tokens of the batch would make the score of an example depend on
which others it is stacked with, need the whole batch in one pass (or a pass more to add up Gram matrices), and have as
its largest directions what all examples have in common, such as the first token's; matrices of single examples are
those of the same model on the same text, whatever the micro-batch.

Memory is that of `walk`: a layer's output is kept anyway, as the input of the next checkpointed layer.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from nirvana.architectures import Architecture
from nirvana.architectures.inputs import ModelInputs
from nirvana.saliency.activations import in_encoder
from nirvana.saliency.afr.polar import polar_factor
from nirvana.saliency.objectives import Head, Totals
from nirvana.saliency.walk import Reduce, walk


def walk_features(
    model: PreTrainedModel,
    architecture: Architecture,
    tokens: Tensor,
    attention_mask: Tensor | None,
    micro_batch: int | None,
    reduce: Reduce,
    progress: Callable[[], None] = lambda: None,
    **options: Any,
) -> None:
    """Hand each weight with its gradient of F to `reduce`, once, over the whole batch; arguments as of `walk`.

    An encoder-decoder has the layers of both stacks; padding belongs to no matrix.
    """
    passes: list[ModelInputs] = []
    tokens = tokens.cpu()  # what is padding is asked for each layer
    attention_mask = None if attention_mask is None else attention_mask.cpu()

    asked = (tokens, attention_mask, micro_batch, reduce, progress, passes.append)
    with _cotangents_added(model, len(tokens), lambda: passes[-1]):
        walk(model, architecture, _no_objective, *asked, **options)


def _no_objective(head: Head, hidden: Tensor, targets: Tensor, valid: Tensor, totals: Totals) -> tuple[Tensor, Tensor]:
    """What lies behind the last layer is no feature: the backward pass brings zeros from there."""
    return torch.zeros((), device=hidden.device), torch.zeros_like(hidden)


@contextlib.contextmanager
def _cotangents_added(model: PreTrainedModel, examples: int, inputs: Callable[[], ModelInputs]) -> Iterator[None]:
    """Inside, each layer's output gets, in the backward pass, the gradient of F besides its own."""

    def hook(encoder: bool, module: nn.Module, arguments: tuple, result: Tensor | tuple) -> Tensor | tuple:
        # The layer's own output: transformers' last hidden state lies behind the final norm.
        features, *more = result if isinstance(result, tuple) else (result,)
        cotangent = functools.partial(_cotangent, real=inputs().real(encoder), examples=examples)
        features = _Feature.apply(features, cotangent)
        return (features, *more) if isinstance(result, tuple) else features

    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                own = functools.partial(hook, in_encoder(model, module))
                stack.callback(module.register_forward_hook(own).remove)
        yield


def _cotangent(features: Tensor, real: list[Tensor] | None, examples: int) -> Tensor:
    """Gradient of a layer's share of F by ``[examples, tokens, hidden]``, in its type; 0 at padding."""
    gradient = torch.zeros_like(features)
    for index, (out, x) in enumerate(zip(gradient, features, strict=True)):
        rows = slice(None) if real is None else real[index].to(x.device)
        x = x[rows]
        if len(x):
            out[rows] = (polar_factor(x) / (min(x.shape) * examples)).to(out.dtype)
    return gradient


class _Feature(torch.autograd.Function):
    """Hands its input on, and in the backward pass adds ``cotangent(input)`` to the gradient."""

    @staticmethod
    def forward(ctx, features: Tensor, cotangent: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(features)
        ctx.cotangent = cotangent
        return features.view_as(features)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        return gradient + ctx.cotangent(*ctx.saved_tensors), None
