"""Closed-form repair: after units are removed, the kept ones take over what can be taken over. No gradients."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from nirvana.architectures import Block, describe
from nirvana.architectures.inputs import model_inputs
from nirvana.calibration.batch import check_tokens
from nirvana.diagnosis import why_not_finite
from nirvana.errors import NirvanaError
from nirvana.masking import kept_channels
from nirvana.patching import evaluation_mode, forward_replaced, head_hands_on
from nirvana.plan import PruningPlan
from nirvana.repair.least_squares import Regression

__all__ = ["LEAST_SQUARES", "METHODS", "NONE", "RIDGE", "check_repair", "repair"]

LEAST_SQUARES, BIAS, NONE = "least-squares", "bias", "none"
METHODS = (LEAST_SQUARES, BIAS, NONE)

#: Of the mean of the diagonal of C. On the demo model at 50 %, KL with 32 examples of 128 tokens: 1.759 (0.01), 1.704
#: (0.1), 1.716 (0.5); with 96 examples: 1.625 (0.001), 1.621 (0.01), 1.630 (0.1).
RIDGE = 0.1


def check_repair(method: str, ridge: float) -> None:
    """Raise NirvanaError unless these are arguments of `repair`."""
    if method not in METHODS:
        raise NirvanaError(f"--repair {method!r} must be one of {', '.join(METHODS)}")
    if not 0 < ridge < math.inf:  # False for nan as well
        raise NirvanaError(f"--repair-ridge {ridge} must be a positive number; 0.1 suits most models")


@torch.no_grad()
def repair(
    model: PreTrainedModel,
    plan: PruningPlan,
    tokens: Tensor | None,
    *,
    method: str = LEAST_SQUARES,
    ridge: float = RIDGE,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Change the output layers (o_proj, down_proj) of the dense `model` so that it computes the repaired pruned model.

    From the first block to the last, in one forward pass: with the activations X of all units on the calibration
    tokens, as they come out of the layers that are pruned and repaired already, the kept columns W_K become W_K + D,
    where D minimises

        sum over tokens of |X W^T - X_K (W_K + D)^T|^2 / |X W^T|^2  +  ridge * mean(diag C) * |D|^2,
        C = the sum over tokens of x_K x_K^T / |x W^T|^2,

    by a Cholesky factorisation of C in fp64. Removed columns become 0, so slicing the result by `plan` changes nothing.

    Two choices were measured on SmolLM2-135M (20 %, 96 x 128 tokens of C4, perplexity on WikiText-2 / novels). The
    ridge pulls towards W_K, not towards 0: 63.8 / 54.1 against 75.7 / 65.2 (not repaired: 75.5 / 97.5). The error of a
    token counts relative to its output, or the first token's activations, which are far larger than the rest, would own
    the fit (KL 0.650 against 0.670). Fitting to the dense model's own outputs, which asks a layer to undo the errors of
    those before it, was worse than no repair (KL 1.12 against 0.99) and is not offered.

    Args:
        model: dense, with its own weights; changed in place.
        plan: made for it.
        tokens: calibration batch, int64 ``[examples, tokens]``; the activations of one layer on all of it are in
            memory. Not needed by "none".
        method: ``"least-squares"``; ``"bias"``, which adds only the mean of what is lost to the biases of output layers
            (FLAP, arXiv 2312.11983; families that have them); or ``"none"``, which only sets removed columns to 0.
        ridge: relative, above 0.
        progress: called after each block.

    Raises:
        NirvanaError: arguments out of range, a family without biases, or activations that are not finite.
    """
    check_repair(method, ridge)
    architecture = describe(model)
    plan.check_fits(architecture)
    parts = [_Part(block, model.get_submodule(block.output), plan.kept[block.name]) for block in architecture.blocks]
    if method == NONE:
        for part in parts:
            part.zero_removed()
            progress()
        return
    for part in parts:
        if method == BIAS and part.layer.bias is None:
            raise NirvanaError(f"--repair bias: {part.block.output} of this family has no bias; use least-squares")
    check_tokens(tokens, model.config)
    refit = functools.partial(_least_squares, ridge=ridge) if method == LEAST_SQUARES else _bias

    def refitted(part: _Part, forward: Callable[[Tensor], Tensor], activations: Tensor) -> Tensor:
        """Stands in for the forward of an output layer: changes its weights, and returns what it computes with them."""
        if not torch.isfinite(activations).all():
            raise NirvanaError(why_not_finite(model))
        if not part.kept.all():
            refit(part, activations.flatten(0, -2))
            part.zero_removed()
        progress()
        return forward(activations)

    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(head_hands_on(model))  # logits of the whole batch would be the largest tensor of the job
        for part in parts:
            replaced = functools.partial(functools.partial, refitted, part)
            stack.enter_context(forward_replaced(part.layer, replaced))
        model(**model_inputs(model, tokens).arguments)


class _Part:
    """An output layer, and which of its input channels stay (bool ``[channels]``)."""

    def __init__(self, block: Block, layer: nn.Linear, kept: tuple[int, ...]):
        self.block, self.layer = block, layer
        self.kept = kept_channels(block, kept, layer.weight.device)

    def zero_removed(self) -> None:
        self.layer.weight[:, ~self.kept] = 0


def _least_squares(part: _Part, activations: Tensor, ridge: float) -> None:
    layer, kept = part.layer, part.kept
    x = activations[:, kept]
    lost = F.linear(activations[:, ~kept], layer.weight[:, ~kept])
    sizes = (F.linear(x, layer.weight[:, kept]) + lost).float().pow(2).sum(dim=1)
    # A token whose output is next to nothing must not count without limit.
    weight = 1 / sizes.clamp(min=1e-6 * float(sizes.mean()) + torch.finfo(torch.float32).tiny)
    fit = Regression(x.shape[1], lost.shape[1], layer.bias is not None, x.device)
    fit.add(x, lost, weight)
    try:
        change, bias = fit.solve(ridge)
    except torch.linalg.LinAlgError:
        raise NirvanaError(
            f"block {part.block.name}: --repair-ridge {ridge} is too small for its activations; 0.1 suits most models"
        ) from None
    layer.weight[:, kept] = (layer.weight[:, kept] + change).to(layer.weight.dtype)
    if bias is not None:
        layer.bias.add_(bias)


def _bias(part: _Part, activations: Tensor) -> None:
    lost = F.linear(activations[:, ~part.kept], part.layer.weight[:, ~part.kept])
    part.layer.bias.add_(lost.double().mean(dim=0))
