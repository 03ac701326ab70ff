"""Scores of an `ActivationCriterion`: the activation walk, then its rule block by block."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from nirvana.architectures import Architecture
from nirvana.diagnosis import faulty_parameter
from nirvana.saliency.activations import examples_per_pass, matrices, walk_activations
from nirvana.saliency.finite import Finite, explained
from nirvana.saliency.kinds import ActivationCriterion, Part
from nirvana.saliency.layers import LayerAngles
from nirvana.saliency.places import on_host
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
    asked = (model, architecture, rule, tokens, attention_mask, micro_batch)
    return explained(model, functools.partial(_score, *asked), progress)


def _score(
    model: PreTrainedModel,
    architecture: Architecture,
    rule: ActivationCriterion,
    tokens: Tensor,
    attention_mask: Tensor | None,
    micro_batch: int | None,
    finite: Finite,
    progress: Callable[[], None],
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    scored = sum(part.scored for block in architecture.blocks for part in block.slices)
    passes = math.ceil(len(tokens) / examples_per_pass(model, tokens, micro_batch))
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
        finite=finite,
    )
    scores = {}
    for block in architecture.blocks:
        weights = [(part, model.get_parameter(part.tensor).detach()) for part in matrices(block)]
        parts = [Part(part, weight, statistics.get(part.tensor)) for part, weight in weights]
        scores[block.name] = rule.score(block, parts)
        fault = f"the scores of {block.name} overflow in {model.dtype}; use --dtype float32"
        finite.check(scores[block.name], lambda fault=fault: faulty_parameter(model) or fault)
    finished = on_host({name: values.float() for name, values in rule.finish(on_host(scores)).items()})
    return finished, {} if angles is None else {"layer_importance": angles.mean()}
