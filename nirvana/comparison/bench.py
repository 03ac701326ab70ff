"""One dense model, and what becomes of it case by case."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nirvana.architectures import Architecture, describe
from nirvana.comparison.cases import PUBLISHED, REFERENCE, Case
from nirvana.comparison.equal import equal_plan, target_parameters
from nirvana.errors import NirvanaError
from nirvana.evaluation.peak import Peak
from nirvana.parameters import count_parameters
from nirvana.published import published
from nirvana.references import REFERENCES
from nirvana.repair import BIAS, NONE, repair
from nirvana.repair.weights import OutputWeights
from nirvana.saliency import Saliency, needs_calibration, score
from nirvana.saliency.afr import score_forms
from nirvana.saliency.criteria import CRITERIA
from nirvana.slicing import apply


@dataclass(frozen=True)
class Pruned:
    """A pruned model, and the facts of its row."""

    model: PreTrainedModel
    facts: dict[str, Any]


class Bench:
    """Makes the pruned models of a comparison.

    Args:
        model: dense; left as it was found.
        tokens: the calibration batch, int64 ``[examples, tokens]``: the same for every criterion and repair.
        align, gamma: of all rules.
        seed: of the criterion "random", and of references that draw.
        micro_batch: see `nirvana.score`.
    """

    def __init__(
        self, model: PreTrainedModel, tokens: Tensor, *, align: int, gamma: float, seed: int, micro_batch: int | None
    ):
        self.model, self.tokens = model, tokens
        self.architecture: Architecture = describe(model)
        self._rule = {"align": align, "gamma": gamma}
        self._seed, self._micro_batch = seed, micro_batch

    @property
    def scored_tensors(self) -> int:
        """How often a scoring pass calls its `progress`."""
        return sum(part.scored for block in self.architecture.blocks for part in block.slices)

    def score(
        self, criteria: Sequence[str], progress: Callable[[], None]
    ) -> tuple[dict[str, Saliency], dict[str, Any]]:
        """Scores, and what they took: seconds and peak memory of the scoring pass alone, in this process.

        Args:
            criteria: one; or several on pairs, with one objective, which share their walks.
            progress: see `nirvana.score`.
        """
        reads = needs_calibration(criteria[0])
        with Peak(self.model.device, give_back=True) as peak:
            started = time.perf_counter()
            if len(criteria) > 1:
                rules = {name: CRITERIA[name] for name in criteria}
                options = {"objective": rules[criteria[0]].objective, "micro_batch": self._micro_batch}
                scores = score_forms(self.model, self.tokens, rules, **options, progress=progress)
            else:
                scores = {criteria[0]: self._score(criteria[0], reads, progress)}
            if self.model.device.type == "cuda":
                torch.cuda.synchronize(self.model.device)
            seconds = time.perf_counter() - started
        return scores, {"seconds": seconds, "peak_bytes": peak.bytes, "reads_calibration": reads}

    def _score(self, criterion: str, reads: bool, progress: Callable[[], None]) -> Saliency:
        return score(
            self.model,
            self.tokens if reads else None,
            criterion=criterion,
            micro_batch=self._micro_batch if reads else None,
            seed=self._seed,
            progress=progress,
        )

    def prune(self, case: Case, saliency: Saliency | None) -> Pruned:
        """The smaller model of a case.

        Raises:
            NirvanaError: the case is impossible; the message says why.
        """
        if case.allocation == REFERENCE:
            return self._reference(case)
        equal = equal_plan(
            saliency,
            self.architecture,
            sparsity=case.sparsity,
            scope=case.scope,
            allocation=case.allocation,
            **self._rule,
        )
        plan = equal.plan
        facts = {
            "parameters": plan.totals["parameters_after"],
            "prunable": plan.totals["prunable_after"],
            "difference": equal.difference,
            "steps_to_target": equal.moved,
        }
        notes = []
        rule = published(case.criterion)
        if case.allocation == PUBLISHED and case.scope == "both" and rule.scope != "both":
            notes.append(f"beyond the paper, which prunes {rule.scope.upper()}s only")
        if case.repair == NONE:
            return Pruned(apply(self.model, plan), facts | {"note": "; ".join(notes)})
        with _lent_biases(self.model, self.architecture, case.repair == BIAS) as lent:
            dense = OutputWeights(self.model, self.architecture)
            try:
                repair(self.model, plan, self.tokens, method=case.repair)
                biases = {path: bias.detach().clone() for path, bias in lent.items()}
                _set_biases(self.model, dict.fromkeys(lent))  # no configuration of the family holds them
                small = apply(self.model, plan)
            finally:
                _set_biases(self.model, lent)
                dense.restore()
        _set_biases(small, {path: nn.Parameter(bias, requires_grad=False) for path, bias in biases.items()})
        if lent:
            count = sum(bias.numel() for bias in biases.values())
            notes.append(f"{count:,} biases of output layers in memory only: no configuration of the family holds them")
        return Pruned(small, facts | {"note": "; ".join(notes)})

    def _reference(self, case: Case) -> Pruned:
        reference = REFERENCES[case.criterion]
        if case.scope not in reference.scopes:
            raise NirvanaError(f"{case.criterion} is there with --scope {', '.join(reference.scopes)} only")
        with Peak(self.model.device, give_back=True) as peak:
            started = time.perf_counter()
            made = reference.prune(self.model, self.tokens, case.sparsity, seed=self._seed, scope=case.scope)
            seconds = time.perf_counter() - started
        before = self.architecture.parameters or count_parameters(self.model.config)
        facts = {
            "parameters": made.parameters_after,
            "prunable": made.prunable_after,
            "difference": made.parameters_after - target_parameters(self.architecture, before, case.sparsity),
            "pruning_seconds": seconds,
            "pruning_peak_bytes": peak.bytes,
            "note": made.note,
        }
        return Pruned(made.model, facts)


@contextlib.contextmanager
def _lent_biases(model: PreTrainedModel, architecture: Architecture, wanted: bool) -> Iterator[dict[str, nn.Parameter]]:
    """Inside, output layers without a bias have one of zeros: path of the layer -> its bias."""
    lent = {}
    if wanted:
        for block in architecture.blocks:
            layer = model.get_submodule(block.output)
            if layer.bias is None:
                lent[block.output] = nn.Parameter(layer.weight.new_zeros(layer.out_features), requires_grad=False)
    _set_biases(model, lent)
    try:
        yield lent
    finally:
        _set_biases(model, dict.fromkeys(lent))


def _set_biases(model: PreTrainedModel, biases: Mapping[str, nn.Parameter | None]) -> None:
    for path, bias in biases.items():
        model.get_submodule(path).bias = bias
