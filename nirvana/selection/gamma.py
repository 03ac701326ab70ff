"""The gamma with the smallest KL on the probe, at fixed saliency: nothing is differentiated again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from nirvana.allocation import allocate
from nirvana.architectures import describe
from nirvana.errors import NirvanaError
from nirvana.masking import masked
from nirvana.plan import BlockPlan, PruningPlan
from nirvana.progress import Progress
from nirvana.selection.probe import Probe, ProbeResult
from nirvana.widths import WidthRule

#: Multiples of the rule's gamma that are looked at after it: around 3.36, 0.84 to 53.8. The largest leaves attention
#: almost whole.
COARSE = (4.0, 0.25, 16.0)

#: Steps around the best so far, one after the other, as long as probes are left.
FINE = tuple(2.0 ** (1 / 2**power) for power in range(5))


@dataclass(frozen=True)
class GammaSearch:
    """What was found.

    Attributes:
        gamma: with the smallest KL; of several that lead to the same plan the one that was tried first.
        plan: under that gamma.
        curve: JSON-ready, by gamma: ``gamma, kl, perplexity, removed_attention, removed_mlp`` (fractions of the
            attention and the MLP parameters) and ``probed``, false where an earlier gamma had led to the same plan; or
            ``gamma, error`` where the rule cannot be met with this gamma.
    """

    gamma: float
    plan: PruningPlan = field(repr=False)
    curve: tuple[dict[str, Any], ...] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the plan."""
        return {"gamma": self.gamma, "curve": list(self.curve)}


def search_gamma(
    model: PreTrainedModel,
    saliency: Mapping[str, Tensor],
    probe: Probe,
    rule: WidthRule,
    *,
    probes: int = 9,
    progress: Progress | None = None,
) -> GammaSearch:
    """Search gamma: a coarse grid on a logarithmic scale, then finer steps around the best.

    Args:
        model: dense; left as it was found.
        saliency: block name -> fp32 ``[units]``; the same for every gamma.
        probe: of this model.
        rule: everything but gamma stays; its gamma is the first that is tried, so the result is never worse.
        probes: forward passes over the probe at most. A gamma that leads to a plan seen before takes none.
        progress: told how far the work is; silent by default.

    Returns:
        The same for the same input: nothing is drawn.

    Raises:
        NirvanaError: `probes` is below 1, only one kind is pruned, or the rule's own gamma leads to no plan.
    """
    if probes < 1:
        raise NirvanaError(f"{probes} probes: at least 1 is needed to search gamma; 9 is a good number")
    check_search(rule)
    if probe.model is not model:
        raise NirvanaError("the probe was made with another model; make one with this model")
    with (progress or Progress()).stage("gamma", probes) as advance:
        search = _Search(model, saliency, probe, rule, probes, advance)
        search.look(rule.gamma)
        for multiple in COARSE:
            search.look(_readable(rule.gamma * multiple))
        for step in FINE:
            centre = search.best
            search.look(_readable(centre * step))
            search.look(_readable(centre / step))
    curve = tuple(search.curve[gamma] for gamma in sorted(search.curve))
    return GammaSearch(search.best, search.plans[search.best], curve)


def check_search(rule: WidthRule) -> None:
    """Raise NirvanaError where gamma decides nothing."""
    if rule.scope != "both":
        raise NirvanaError(f"--gamma auto means nothing with --scope {rule.scope}, which prunes one kind only")


class _Search:
    """Plans and probes of the gammas looked at."""

    def __init__(
        self,
        model: PreTrainedModel,
        saliency: Mapping[str, Tensor],
        probe: Probe,
        rule: WidthRule,
        probes: int,
        advance: Callable[[int], None],
    ):
        self._model, self._saliency, self._probe, self._rule = model, saliency, probe, rule
        self._left, self._advance = probes, advance
        self._results: dict[tuple[BlockPlan, ...], ProbeResult] = {}
        self.plans: dict[float, PruningPlan] = {}
        self.curve: dict[float, dict[str, Any]] = {}
        self.best = rule.gamma

    def look(self, gamma: float) -> None:
        if gamma in self.curve or not self._left:
            return
        try:
            plan = allocate(self._saliency, self._model, **asdict(replace(self._rule, gamma=gamma)))
        except NirvanaError as error:
            if gamma == self._rule.gamma:
                raise
            self.curve[gamma] = {"gamma": gamma, "error": str(error)}
            return
        probed = plan.blocks not in self._results
        if probed:
            with masked(self._model, plan):
                self._results[plan.blocks] = self._probe.divergence()
            self._left -= 1
            self._advance(1)
        result = self._results[plan.blocks]
        self.plans[gamma] = plan
        self.curve[gamma] = {
            "gamma": gamma,
            "kl": result.kl,
            "perplexity": result.perplexity,
            **_removed(self._model, plan),
            "probed": probed,
        }
        if result.kl < self.curve[self.best]["kl"]:
            self.best = gamma


def _removed(model: PreTrainedModel, plan: PruningPlan) -> dict[str, float]:
    """Removed fraction of the attention parameters and of the MLP parameters."""
    kept = plan.kept
    before, after = Counter(), Counter()
    for block in describe(model).blocks:
        kind = "removed_attention" if block.is_attention else "removed_mlp"
        before[kind] += block.size * block.parameters_per_unit
        after[kind] += len(kept[block.name]) * block.parameters_per_unit
    return {kind: 1 - after[kind] / before[kind] for kind in before}


def _readable(gamma: float) -> float:
    """Four digits, so that whoever types the gamma that is reported gets the same plan."""
    return float(f"{gamma:.4g}")
