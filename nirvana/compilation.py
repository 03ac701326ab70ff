"""torch.compile layer by layer, for models whose layers differ in width."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

#: Compiled variants (text lengths, with and without cache) that torch allows one function by default.
VARIANTS = 8


def compile_layers(model: PreTrainedModel, **options: Any) -> PreTrainedModel:
    """Compile each layer of `model` in place (regional compilation: far quicker than the whole model at once).

    All layers of a class share one function, and torch compiles it again for every distinct pair of widths; with a
    cache, for every layer. Beyond `torch._dynamo.config.recompile_limit`, 8 by default, the rest silently stays
    eager. So the limit is raised to 8 for each layer, for the whole process, and never lowered. Whoever calls
    `layer.compile()` or `torch.compile(layer)` himself has to raise it himself, or prune with `--max-widths 8`.
    The whole model, `torch.compile(model)`, is one graph and meets no limit.

    Args:
        model: any transformers model.
        options: handed to `torch.nn.Module.compile`, e.g. ``backend="inductor"``, ``dynamic=True``.

    Returns:
        The same model.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, VARIANTS * len(layers))
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, VARIANTS * len(layers))
    for layer in layers:
        layer.compile(**options)
    return model
