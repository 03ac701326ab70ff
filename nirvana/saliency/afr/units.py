"""Scores of units from those of their weights, block after block, for one or several forms."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nirvana.architectures import Architecture, Block, Slice
from nirvana.ops import mixture_bounds
from nirvana.saliency.activations import matrices
from nirvana.saliency.afr.gradients import walk_pairs
from nirvana.saliency.afr.terms import finite_terms
from nirvana.saliency.finite import Finite, explained
from nirvana.saliency.kinds import PairCriterion
from nirvana.saliency.objectives import Objective
from nirvana.saliency.places import on_host


def score_pairs(
    model: PreTrainedModel,
    architecture: Architecture,
    rules: Mapping[str, PairCriterion],
    objective: Objective,
    tokens: Tensor,
    attention_mask: Tensor | None,
    micro_batch: int | None,
    progress: Callable[[], None] = lambda: None,
    gradient_checkpointing: bool | None = None,
) -> dict[str, dict[str, Tensor]]:
    """Name of the rule -> block name -> fp32 ``[units]`` on the CPU. Several rules cost one pair of walks.

    Memory besides that of `walk_pairs`: the scores of one block's weights, fp32, three times over.

    Args:
        rules: any names.
        model, architecture, objective, tokens, attention_mask, micro_batch, progress, gradient_checkpointing:
            see `walk_pairs`.

    Raises:
        NirvanaError: something is not finite; the message names the parameter.
    """
    asked = (objective, tokens, attention_mask, micro_batch, gradient_checkpointing)
    scores = explained(model, functools.partial(_score, model, architecture, rules, *asked), progress)
    host = on_host({(rule, name): values for rule, found in scores.items() for name, values in found.items()})
    return {rule: {block.name: host[rule, block.name] for block in architecture.blocks} for rule in rules}


def _score(
    model: PreTrainedModel,
    architecture: Architecture,
    rules: Mapping[str, PairCriterion],
    objective: Objective,
    tokens: Tensor,
    attention_mask: Tensor | None,
    micro_batch: int | None,
    gradient_checkpointing: bool | None,
    finite: Finite,
    progress: Callable[[], None],
) -> dict[str, dict[str, Tensor]]:
    """What `score_pairs` returns, on the model's devices."""
    blocks = {block.name: block for block in architecture.blocks}
    awaited = {name: {part.tensor for part in matrices(block)} for name, block in blocks.items()}
    tables: dict[str, dict[bool, Tensor]] = {}
    scores: dict[str, dict[str, Tensor]] = {rule: {} for rule in rules}
    signs = {rule.signed for rule in rules.values()}

    def reduce(name: str, part: Slice, weight: Tensor, features: Tensor, loss: Tensor) -> None:
        block = blocks[name]
        if name not in tables:
            shape = (block.size, block.parameters_per_unit)
            tables[name] = {signed: torch.empty(shape, device=weight.device) for signed in signs}
        for signed, table in tables[name].items():
            terms = finite_terms(model, finite, part, weight, features, loss, signed)
            table[:, _columns(block, part)] = (terms.T if part.axis else terms).reshape(block.size, -1)
        awaited[name].remove(part.tensor)
        if not awaited[name]:
            for rule, values in _aggregated(rules, tables.pop(name)).items():
                scores[rule][name] = values.float()

    asked = (objective, tokens, attention_mask, micro_batch, reduce, progress)
    options = {"finite": finite, "gradient_checkpointing": gradient_checkpointing}
    walk_pairs(model, architecture, *asked, **options)
    return scores


def _columns(block: Block, part: Slice) -> slice:
    """Where the scores of one matrix stand in the block's table ``[units, m]``."""
    before = 0
    for each in matrices(block):
        count = each.unit * each.width
        if each == part:
            return slice(before, before + count)
        before += count
    raise ValueError(f"{part.tensor} is no scored matrix of {block.name}")


def _aggregated(rules: Mapping[str, PairCriterion], tables: Mapping[bool, Tensor]) -> dict[str, Tensor]:
    """Name of the rule -> ``[units]``."""
    scores = {}
    for signed, table in tables.items():
        # Winsorised scores last: they take the place of the others.
        of_table = sorted((rule.winsorised, name) for name, rule in rules.items() if rule.signed == signed)
        clipped = False
        for winsorised, name in of_table:
            if winsorised and not clipped:
                low, high, _ = mixture_bounds(table)
                table.clamp_(low[:, None], high[:, None])
                clipped = True
            scores[name] = rules[name].aggregate(table)
    return scores
