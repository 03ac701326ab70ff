"""Schemas and fake (shape-only) forms of every operator: what torch.compile, export and opcheck know of them.

Eager calls do not come by here: they go straight from the public function to the backend, because the way through the
dispatcher costs more than a small kernel. Each operator has one implementation for all devices, which chooses the
backend. Nothing here is differentiable: scores and copies are made outside of the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("nirvana", "DEF")

LIBRARY.define("group_saliency(Tensor weight, Tensor? grad, int axis, int group, int statistics) -> Tensor")
LIBRARY.define(
    "foreach_group_saliency_(Tensor(a!)[] outs, int[] targets, Tensor[] weights, Tensor?[] grads, int[] axes, "
    "int[] groups, int statistics) -> ()"
)
LIBRARY.define("gather_slice(Tensor[] weights, Tensor kept, int axis, int unit) -> Tensor[]")
LIBRARY.define("kl_divergence(Tensor logits_p, Tensor logits_q) -> Tensor")
LIBRARY.define("kl_divergence_state(Tensor logits_p, Tensor logits_q) -> Tensor")
LIBRARY.define(
    "mixture_bounds(Tensor scores, int max_components, float density_fraction) -> (Tensor low, Tensor high, "
    "Tensor components)"
)


def traced(*tensors: Tensor | None) -> bool:
    """Whether a call is only recorded (compiled, exported, fake tensors), which is what the dispatcher is for. Of all
    tensors of a call: a single one without memory must reach no kernel."""
    return torch.compiler.is_compiling() or any(
        tensor is not None and type(tensor) is not Tensor and not isinstance(tensor, torch.nn.Parameter)
        for tensor in tensors
    )


def implements(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the decorated function as the operator `name` on every device, outside of the graph."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        LIBRARY.impl(name, torch.no_grad()(function), "CompositeExplicitAutograd")
        return function

    return register


@torch.library.register_fake("nirvana::group_saliency", lib=LIBRARY)
def _(weight: Tensor, grad: Tensor | None, axis: int, group: int, statistics: int) -> Tensor:
    return weight.new_empty((statistics.bit_count(), weight.shape[axis] // group), dtype=torch.float32)


@torch.library.register_fake("nirvana::foreach_group_saliency_", lib=LIBRARY)
def _(
    outs: list[Tensor],
    targets: list[int],
    weights: list[Tensor],
    grads: list[Tensor | None],
    axes: list[int],
    groups: list[int],
    statistics: int,
) -> None:
    return None


@torch.library.register_fake("nirvana::gather_slice", lib=LIBRARY)
def _(weights: list[Tensor], kept: Tensor, axis: int, unit: int) -> list[Tensor]:
    shapes = [list(weight.shape) for weight in weights]
    for shape in shapes:
        shape[axis] = kept.shape[0] * unit
    return [weight.new_empty(shape) for weight, shape in zip(weights, shapes, strict=True)]


@torch.library.register_fake("nirvana::kl_divergence", lib=LIBRARY)
def _(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    return logits_p.new_empty(logits_p.shape[:-1], dtype=torch.float32)


@torch.library.register_fake("nirvana::kl_divergence_state", lib=LIBRARY)
def _(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    return logits_p.new_empty((5, logits_p.shape[0]), dtype=torch.float64)


@torch.library.register_fake("nirvana::mixture_bounds", lib=LIBRARY)
def _(scores: Tensor, max_components: int, density_fraction: float) -> tuple[Tensor, Tensor, Tensor]:
    low, high = (scores.new_empty(scores.shape[:1], dtype=torch.float32) for _ in range(2))
    return low, high, scores.new_empty(scores.shape[:1], dtype=torch.int32)
