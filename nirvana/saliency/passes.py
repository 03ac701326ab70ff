"""Backward passes of an objective over a calibration batch, and the state that a model is in meanwhile."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nirvana.architectures.inputs import IGNORE, ModelInputs, mask_of, model_inputs, predicted
from nirvana.calibration.batch import check_tokens
from nirvana.diagnosis import faulty_parameter, why_not_finite
from nirvana.errors import NirvanaError
from nirvana.patching import evaluation_mode, head_hands_on
from nirvana.saliency.finite import Finite
from nirvana.saliency.objectives import OBJECTIVES, Head, Objective, Totals


def check_request(model: PreTrainedModel, objective: str, tokens: Tensor, micro_batch: int | None) -> None:
    """Raise NirvanaError unless there is such an objective and the batch is one for this model."""
    if objective not in OBJECTIVES:
        raise NirvanaError(f"--objective {objective!r} is unknown; known are {', '.join(OBJECTIVES)}")
    check_batch(model, tokens, micro_batch)


def check_batch(model: PreTrainedModel, tokens: Tensor, micro_batch: int | None) -> None:
    """Raise NirvanaError unless the batch is one for this model."""
    if micro_batch is not None and micro_batch < 1:
        raise NirvanaError(f"--micro-batch {micro_batch} must be at least 1")
    check_tokens(tokens, model.config)


def backward_passes(
    model: PreTrainedModel,
    objective: Objective,
    tokens: Tensor,
    attention_mask: Tensor | None,
    micro_batch: int | None,
    finite: Finite,
    before_pass: Callable[[ModelInputs], None] = lambda inputs: None,
) -> Iterator[Callable[[], Tensor]]:
    """One call for each micro-batch: a forward and a backward pass, which returns its share of the objective (fp64).

    Args:
        tokens: int64 ``[examples, tokens]``.
        attention_mask: ``[examples, tokens]`` or None.
        micro_batch: examples per pass; None takes all at once.
        finite: looks at hidden states and at their gradient.
        before_pass: called with the inputs of each pass before it.

    Raises:
        NirvanaError: an example has nothing to predict, or something is not finite; the message names the parameter.
    """
    step = micro_batch or len(tokens)
    totals = _totals(model, tokens, attention_mask)
    for start in range(0, len(tokens), step):
        mask = None if attention_mask is None else attention_mask[start : start + step]
        inputs = model_inputs(model, tokens[start : start + step], mask)
        before_pass(inputs)
        yield functools.partial(_backward, model, objective, inputs, totals, finite)


def _backward(
    model: PreTrainedModel, objective: Objective, inputs: ModelInputs, totals: Totals, finite: Finite
) -> Tensor:
    """One forward and backward pass. The head runs inside the objective, in chunks, on the device of its weights."""
    head = model.get_output_embeddings()
    with head_hands_on(model), torch.enable_grad():
        hidden = model(**inputs.arguments).logits
    finite.check(hidden, lambda: why_not_finite(model))
    place = head.weight.device
    with torch.no_grad():
        value, gradient = objective(
            Head(head.weight.detach(), None if getattr(head, "bias", None) is None else head.bias.detach()),
            hidden.detach().to(place),
            inputs.targets.to(place),
            inputs.valid.to(place),
            totals,
        )
    # Where no parameter is at fault, the first gradient that is not finite is named.
    finite.check(gradient, lambda: faulty_parameter(model))
    hidden.backward(gradient.to(hidden.device, hidden.dtype))
    return value.double()


def _totals(model: PreTrainedModel, tokens: Tensor, attention_mask: Tensor | None) -> Totals:
    targets, valid = predicted(model.config, tokens, mask_of(tokens, attention_mask))
    count = int((targets != IGNORE).sum())
    if count == 0 or not bool(valid.any(dim=1).all()):
        raise NirvanaError("an example of the calibration batch holds no token to predict; give longer examples")
    return Totals(len(tokens), count, padded=attention_mask is not None)


@contextlib.contextmanager
def only_these_learn(model: nn.Module, parameters: dict[str, nn.Parameter]) -> Iterator[None]:
    """Gradients for the prunable weights alone (never embeddings, norms, head); dropout off; all restored after."""
    learned = {p: p.requires_grad for p in model.parameters()}
    gradients = {p: p.grad for p in parameters.values()}
    chosen = set(parameters.values())
    for parameter in learned:
        parameter.requires_grad_(parameter in chosen)
    for parameter in chosen:
        parameter.grad = None
    try:
        with evaluation_mode(model):
            yield
    finally:
        for parameter, flag in learned.items():
            parameter.requires_grad_(flag)
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
