"""How much of the neural tangent kernel a plan keeps, predicted and measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nirvana.architectures import Slice, describe
from nirvana.diagnosis import why_not_finite
from nirvana.masking import masked
from nirvana.ops import group_saliency
from nirvana.plan import PruningPlan
from nirvana.saliency.finite import Finite, explained
from nirvana.saliency.objectives import OBJECTIVES
from nirvana.saliency.passes import check_request
from nirvana.saliency.places import empty_scores, on_host
from nirvana.saliency.walk import walk


def ntk_report(
    model: PreTrainedModel,
    plan: PruningPlan,
    tokens: Tensor,
    *,
    objective: str = "max-logit",
    attention_mask: Tensor | None = None,
    micro_batch: int | None = None,
) -> dict[str, Any]:
    """Compare the kernel of the dense model with that of the model that `plan` leaves, on one probe batch.

    Under sign-like updates (Adam) the kernel of the objective f is Theta = <g, sign(g)> = sum |g|, where g is the
    gradient of f, one scalar for the whole batch, by the prunable weights (NIRVANA, arXiv 2509.14230). Two backward
    passes give, for each block and for all of them together:

    * ``dense``: Theta of the dense model, sum |g| over all its units.
    * ``kept``: the part of ``dense`` that the kept units hold: Theta after pruning, to first order, as if the gradients
      of the kept weights stayed what they are.
    * ``pruned``: Theta of the pruned model, sum |g'| over the kept units, with g' taken in the masked model (`masked`),
      which computes what the sliced model does.
    * ``drift``: |dense - pruned|, what really changes. The total is that of the totals, in which blocks may cancel.
    * ``first_order_bound``: dense - kept = sum |g| over the removed units, what the drift would be if the gradients of
      the kept weights did not change. Where they do, the drift may exceed it.
    * ``kept_fraction``: kept / dense (0 where dense is 0).

    Args:
        model: the dense model, in any floating-point type; it is left as it was found.
        plan: which units stay.
        tokens: probe batch, int64 ``[examples, tokens]``.
        objective: "max-logit" or "nll".
        attention_mask: ``[examples, tokens]``, 0 where a short example is padded.
        micro_batch: examples per forward pass; see `nirvana.score`.

    Returns:
        JSON-ready: ``objective``, ``probe_shape``, ``value`` (f of ``dense`` and ``pruned``), the six figures in
        ``total``, and in ``blocks`` for each block with its ``name``.

    Raises:
        NirvanaError: the plan is for another model, or bad input as for `nirvana.score`.
    """
    architecture = describe(model)
    plan.check_fits(architecture)
    check_request(model, objective, tokens, micro_batch)

    def theta(finite: Finite, progress: Callable[[], None]) -> tuple[float, dict[str, Tensor]]:
        sums = empty_scores(model, architecture)

        def reduce(block: str, part: Slice, weight: Tensor, gradient: Tensor) -> None:
            out = sums[block]
            weight, gradient = weight.to(out.device), gradient.to(out.device)
            group_saliency(weight, gradient, axis=part.axis, group=part.unit, statistics="ntk", out=out)

        asked = (OBJECTIVES[objective], tokens, attention_mask, micro_batch, reduce, progress)
        value = walk(model, architecture, *asked, finite=finite)
        for values in sums.values():
            finite.check(values, lambda: why_not_finite(model))
        return float(value), {name: values.double() for name, values in on_host(sums).items()}

    value, dense = explained(model, theta)
    with masked(model, plan):
        pruned_value, pruned = explained(model, theta)
    figures = []
    for name, units in plan.kept.items():
        kept = torch.tensor(units)
        figures.append([float(dense[name].sum()), float(dense[name][kept].sum()), float(pruned[name][kept].sum())])
    return {
        "objective": objective,
        "probe_shape": list(tokens.shape),
        "value": {"dense": value, "pruned": pruned_value},
        "total": _compared(*(sum(column) for column in zip(*figures, strict=True))),
        "blocks": [{"name": name, **_compared(*row)} for name, row in zip(plan.kept, figures, strict=True)],
    }


def _compared(dense: float, kept: float, pruned: float) -> dict[str, float]:
    return {
        "dense": dense,
        "kept": kept,
        "pruned": pruned,
        "drift": abs(dense - pruned),
        "first_order_bound": dense - kept,
        "kept_fraction": kept / dense if dense else 0.0,
    }
