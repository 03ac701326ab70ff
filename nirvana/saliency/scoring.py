"""`score`: which criterion and objective, checked, and the walk that they need."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nirvana.architectures import Architecture, Slice, describe
from nirvana.calibration.manifest import tokens_sha256
from nirvana.diagnosis import faulty_parameter
from nirvana.errors import NirvanaError
from nirvana.saliency.afr import score_forms
from nirvana.saliency.combination import combine
from nirvana.saliency.criteria import CRITERIA, RANDOM
from nirvana.saliency.finite import Finite, explained
from nirvana.saliency.kinds import ActivationCriterion, MaskCriterion, PairCriterion, WeightCriterion
from nirvana.saliency.masks import walk_masks
from nirvana.saliency.measured import score_activations
from nirvana.saliency.objectives import OBJECTIVES
from nirvana.saliency.passes import check_batch, check_request
from nirvana.saliency.places import empty_scores, on_host
from nirvana.saliency.scores import Saliency
from nirvana.saliency.steps import rescaled
from nirvana.saliency.walk import walk, walk_examples

CRITERION_NAMES = (*CRITERIA, RANDOM)


def needs_calibration(criterion: str) -> bool:
    """Whether the criterion, or one of "a+b", reads a calibration batch: differentiates on it, or only runs on it."""
    return any(name in CRITERIA and CRITERIA[name].reads_tokens for name in criterion.split("+"))


def score(
    model: PreTrainedModel,
    tokens: Tensor | None = None,
    *,
    criterion: str = "nirvana",
    objective: str | None = None,
    attention_mask: Tensor | None = None,
    micro_batch: int | None = None,
    gradient_checkpointing: bool | None = None,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> Saliency:
    """Score every unit of every block of `model`.

    m_nj below is the derivative of the objective, a mean over the whole batch, by a mask on unit j in example n alone:
    with N examples, 1/N of the derivative of what is the example's own.

    Args:
        model: a supported model with its language-model head, in any floating-point type, on any device, or its
            layers on several. It is left as it was found.
        tokens: calibration batch, int64 ``[examples, tokens]``. Not needed by "magnitude...", and "random".
        criterion: "nirvana" (sum of |gradient x weight|), "mask-fisher" (sum over examples of m_nj^2), "mask-abs" (sum
            over examples of |m_nj|), "magnitude" (sum of |weight|) or "random"; those of other papers in
            `nirvana.saliency.rivals`: "magnitude-l2", "llm-pruner", "llm-pruner-vector", "llm-pruner-faithful",
            "taylor2" (a backward pass an example), "wanda-sp", "flap", "cfsp", "cfsp-faithful", "lorap" (one forward
            pass); AFR's in `nirvana.saliency.afr`: "afr-mean", "afr-abs", "afr-gmm", "afr-abs-gmm" (two backward
            passes); or several, as "nirvana+mask-fisher": the mean of their ranks (`combine`).
        objective: the scalar that is differentiated: "max-logit" (as published) or "nll". None takes the criterion's
            own: max-logit for nirvana, nll for all others that differentiate.
        attention_mask: ``[examples, tokens]``, 0 where a short example is padded; padding counts for nothing.
        micro_batch: examples per forward pass. Same scores. nirvana and llm-pruner take all at once unless told, and
            pay an fp32 buffer the size of the prunable weights for more passes; so do those of AFR, which keep the
            size of the prunable weights anyway; taylor2 takes one at a time always; all others pay nothing and take
            512 tokens at a time on a CPU, 4096 on a GPU.
        gradient_checkpointing: whether layers keep their input alone and are run again in the backward pass, which
            takes less memory and, on a GPU, a third more products. Same bits. None decides: on a GPU those layers do
            whose activations do not fit in its free memory; on a CPU, where it costs no time, all of them, but none
            for mask-fisher and mask-abs, which take few tokens at a time.
        seed: of the "random" criterion.
        progress: called as often as the model has tensors that are scored.

    Returns:
        Block name -> fp32 ``[units]`` on the CPU, larger = keep.

    Raises:
        NirvanaError: unknown names, an objective for a criterion that differentiates nothing, token ids beyond the
            vocabulary, or NaN and infinity in weights, activations or gradients.
    """
    names = criterion.split("+")
    every = (*CRITERIA, RANDOM)  # with those that were registered since
    if not all(name in every for name in names) or len(set(names)) < len(names):
        known = f"known are {', '.join(every)}, and several of them as a+b"
        raise NirvanaError(f"--criterion {criterion!r} is unknown; {known}")
    architecture = describe(model)
    if len(names) > 1:
        options = {"attention_mask": attention_mask, "micro_batch": micro_batch, "seed": seed}
        options["gradient_checkpointing"] = gradient_checkpointing
        options["progress"] = rescaled(progress, len(names), 1)
        differentiated = {name: name in CRITERIA and CRITERIA[name].objective for name in names}
        parts = [
            score(model, tokens, criterion=name, objective=objective if differentiated[name] else None, **options)
            for name in names
        ]
        return score_of_sum(criterion, parts, architecture)
    if criterion == RANDOM:
        return _random(architecture, seed)
    rule = CRITERIA[criterion]
    settings: dict[str, Any] = {"criterion": criterion}
    if not rule.reads_tokens:
        scores = explained(model, functools.partial(_score_weights, model, architecture, rule), progress)
        return Saliency(on_host(scores), settings)
    runs_only = isinstance(rule, ActivationCriterion)
    if runs_only and objective is not None:
        raise NirvanaError(
            f"--objective {objective}: criterion {criterion!r} differentiates nothing; leave --objective out"
        )
    objective = rule.objective if objective is None else objective
    if tokens is None:
        raise NirvanaError(f"criterion {criterion!r} needs a calibration batch")
    if isinstance(rule, PairCriterion):
        options = {"attention_mask": attention_mask, "micro_batch": micro_batch, "progress": progress}
        options["gradient_checkpointing"] = gradient_checkpointing
        return score_forms(model, tokens, {criterion: rule}, objective=objective, **options)[criterion]
    if runs_only:
        check_batch(model, tokens, micro_batch)
    else:
        check_request(model, objective, tokens, micro_batch)
        settings["objective"] = objective
    settings |= {
        "calibration_shape": list(tokens.shape),
        "calibration_sha256": tokens_sha256(tokens),
    }
    if runs_only:
        measured, found = score_activations(model, architecture, rule, tokens, attention_mask, micro_batch, progress)
        return Saliency(measured, settings | found)
    way = _score_masks if isinstance(rule, MaskCriterion) else _score_gradients
    batch = (OBJECTIVES[objective], tokens, attention_mask, micro_batch)
    asked = functools.partial(way, model, architecture, rule, batch, gradient_checkpointing)
    return Saliency(on_host(explained(model, asked, progress)), settings)


def _score_weights(
    model: PreTrainedModel,
    architecture: Architecture,
    rule: WeightCriterion,
    finite: Finite,
    progress: Callable[[], None],
) -> dict[str, Tensor]:
    scores = empty_scores(model, architecture)
    for block in architecture.blocks:
        for part in block.slices:
            if part.scored:
                weight = model.get_parameter(part.tensor).detach()
                _reduce(model, rule, scores[block.name], finite, part, weight, None)
                progress()
    return scores


def _score_gradients(
    model: PreTrainedModel,
    architecture: Architecture,
    rule: WeightCriterion,
    batch: tuple,
    gradient_checkpointing: bool | None,
    finite: Finite,
    progress: Callable[[], None],
) -> dict[str, Tensor]:
    scores = empty_scores(model, architecture)

    def reduce(block: str, part: Slice, weight: Tensor, gradient: Tensor) -> None:
        _reduce(model, rule, scores[block], finite, part, weight, gradient)

    way = walk_examples if rule.per_example else walk
    options = {"finite": finite, "gradient_checkpointing": gradient_checkpointing}
    way(model, architecture, *batch, reduce, progress, **options)
    if rule.per_example:
        _, tokens, *_ = batch
        scores = {name: values / len(tokens) for name, values in scores.items()}
    return scores


def _score_masks(
    model: PreTrainedModel,
    architecture: Architecture,
    rule: MaskCriterion,
    batch: tuple,
    gradient_checkpointing: bool | None,
    finite: Finite,
    progress: Callable[[], None],
) -> dict[str, Tensor]:
    scores = empty_scores(model, architecture)

    def reduce(block: str, masks: Tensor) -> None:
        rule.add(masks, scores[block])
        finite.check_sum(scores[block], functools.partial(_fault, model, f"a mask on {block}"))

    options = {"finite": finite, "gradient_checkpointing": gradient_checkpointing}
    walk_masks(model, architecture, *batch, reduce, progress, **options)
    return scores


def _reduce(
    model: PreTrainedModel,
    rule: WeightCriterion,
    scores: Tensor,
    finite: Finite,
    part: Slice,
    weight: Tensor,
    gradient: Tensor | None,
) -> None:
    # A block whose matrices are on several devices is scored where its output layer is.
    place = scores.device
    rule.add(weight.to(place), None if gradient is None else gradient.to(place), part, scores)
    finite.check_sum(scores, functools.partial(_fault, model, part.tensor))


def _fault(model: PreTrainedModel, what: str) -> str:
    # Only when something is wrong are all parameters searched: NaN in one shows up in the gradients of others.
    fault = f"the gradient of {what} holds NaN or infinity in {model.dtype}; use --dtype float32"
    return faulty_parameter(model) or fault


def score_of_sum(criterion: str, parts: Sequence[Saliency], architecture: Architecture) -> Saliency:
    """What `score` gives for a sum a+b of criteria, of the scores of its parts."""
    combined = combine(parts, how="rank-mean", model=architecture)
    return Saliency(combined, {"criterion": criterion, **combined.settings})


def _random(architecture: Architecture, seed: int) -> Saliency:
    if not 0 <= seed < 2**63:
        raise NirvanaError(f"--seed {seed} must be at least 0 and below 2^63")
    generator = torch.Generator().manual_seed(seed)
    scores = {block.name: torch.rand(block.size, generator=generator) for block in architecture.blocks}
    return Saliency(scores, {"criterion": RANDOM, "seed": seed})
