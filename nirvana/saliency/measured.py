"""Scores of an `ActivationCriterion`: the activation walk, then its rule block by block."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nirvana.architectures import Architecture
from nirvana.diagnosis import faulty_parameter
from nirvana.errors import NirvanaError
from nirvana.saliency.activations import examples_per_pass, matrices, walk_activations
from nirvana.saliency.kinds import ActivationCriterion, Part
from nirvana.saliency.layers import LayerAngles
from nirvana.saliency.steps import rescaled


def score_activations(
    model: PreTrainedModel,
    architecture: Architecture,
    rule: ActivationCriterion,
    tokens: Tensor,
    attention_mask: Tensor | None,
    micro_batch: int | None,
    progress: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Block name -> fp32 ``[units]`` on the CPU, and what the saliency's settings get besides.

    Args:
        model, tokens, attention_mask, micro_batch: see `walk_activations`.
        progress: called as often as the model has tensors that are scored.

    Raises:
        NirvanaError: something is not finite; the message names the parameter.
    """
    scored = sum(part.scored for block in architecture.blocks for part in block.slices)
    passes = math.ceil(len(tokens) / examples_per_pass(tokens, micro_batch))
    angles = LayerAngles() if rule.measures_layers else None
    statistics = walk_activations(
        model,
        architecture,
        tokens,
        attention_mask,
        micro_batch,
        rule.reads_inputs,
        angles and angles.watch,
        rescaled(progress, passes, scored),
    )
    scores = {}
    for block in architecture.blocks:
        weights = [(part, model.get_parameter(part.tensor).detach()) for part in matrices(block)]
        parts = [Part(part, weight, statistics.get(part.tensor)) for part, weight in weights]
        scores[block.name] = rule.score(block, parts)
        if not torch.isfinite(scores[block.name]).all():
            fault = f"the scores of {block.name} overflow in {model.dtype}; use --dtype float32"
            raise NirvanaError(faulty_parameter(model) or fault)
    finished = {name: values.float().cpu() for name, values in rule.finish(scores).items()}
    return finished, {} if angles is None else {"layer_importance": angles.mean()}
