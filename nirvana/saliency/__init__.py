"""Model + calibration batch -> one score per unit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nirvana.architectures import Slice, describe
from nirvana.calibration.batch import check_tokens
from nirvana.diagnosis import faulty_parameter
from nirvana.errors import NirvanaError
from nirvana.saliency.criteria import CRITERIA, RANDOM
from nirvana.saliency.objectives import OBJECTIVES
from nirvana.saliency.scores import Saliency
from nirvana.saliency.walk import walk

__all__ = ["CRITERION_NAMES", "OBJECTIVES", "Saliency", "needs_calibration", "score"]

CRITERION_NAMES = (*CRITERIA, RANDOM)


def needs_calibration(criterion: str) -> bool:
    """Whether the criterion differentiates an objective and so needs a calibration batch."""
    return criterion in CRITERIA and CRITERIA[criterion].needs_gradients


def score(
    model: PreTrainedModel,
    tokens: Tensor | None = None,
    *,
    criterion: str = "nirvana",
    objective: str = "max-logit",
    attention_mask: Tensor | None = None,
    micro_batch: int | None = None,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> Saliency:
    """Score every unit of every block of `model`.

    Args:
        model: a supported model with its language-model head, in any floating-point type, on any device. It is left
            as it was found.
        tokens: calibration batch, int64 ``[examples, tokens]``. Not needed by "magnitude" and "random".
        criterion: "nirvana" (sum of |gradient x weight|), "magnitude" (sum of |weight|) or "random".
        objective: the scalar that is differentiated: "max-logit" (as published) or "nll".
        attention_mask: ``[examples, tokens]``, 0 where a short example is padded; padding counts for nothing.
        micro_batch: examples per forward pass. Same scores; costs an fp32 buffer the size of the prunable weights.
        seed: of the "random" criterion.
        progress: called once for each scored tensor.

    Returns:
        Block name -> fp32 ``[units]`` on the CPU, larger = keep.

    Raises:
        NirvanaError: unknown names, token ids beyond the vocabulary, or NaN and infinity in weights or gradients.
    """
    architecture = describe(model)
    scores = {block.name: torch.zeros(block.size, device=model.device) for block in architecture.blocks}
    settings = {"criterion": criterion}
    if criterion == RANDOM:
        if not 0 <= seed < 2**63:
            raise NirvanaError(f"--seed {seed} must be at least 0 and below 2^63")
        generator = torch.Generator().manual_seed(seed)
        scores = {name: torch.rand(len(values), generator=generator) for name, values in scores.items()}
        return Saliency(scores, {**settings, "seed": seed})
    if criterion not in CRITERIA:
        raise NirvanaError(f"--criterion {criterion!r} is unknown; known are {', '.join(CRITERION_NAMES)}")
    rule = CRITERIA[criterion]

    def reduce(block: str, part: Slice, weight: Tensor, gradient: Tensor | None) -> None:
        rule.add(weight, gradient, part, scores[block])
        if not torch.isfinite(scores[block]).all():
            # Only when something is wrong are all parameters searched: NaN in one shows up in the gradients of others.
            fault = f"the gradient of {part.tensor} holds NaN or infinity in {model.dtype}; use --dtype float32"
            raise NirvanaError(faulty_parameter(model) or fault)

    if rule.needs_gradients:
        if objective not in OBJECTIVES:
            raise NirvanaError(f"--objective {objective!r} is unknown; known are {', '.join(OBJECTIVES)}")
        if tokens is None:
            raise NirvanaError(f"criterion {criterion!r} needs a calibration batch")
        if micro_batch is not None and micro_batch < 1:
            raise NirvanaError(f"--micro-batch {micro_batch} must be at least 1")
        check_tokens(tokens, model.config)
        settings |= {
            "objective": objective,
            "calibration_shape": list(tokens.shape),
            "calibration_sha256": hashlib.sha256(tokens.cpu().contiguous().numpy().tobytes()).hexdigest(),
        }
        walk(model, architecture, OBJECTIVES[objective], tokens, attention_mask, micro_batch, reduce, progress)
    else:
        for block in architecture.blocks:
            for part in block.slices:
                if part.scored:
                    reduce(block.name, part, model.get_parameter(part.tensor).detach(), None)
                    progress()
    return Saliency({name: values.cpu() for name, values in scores.items()}, settings)
