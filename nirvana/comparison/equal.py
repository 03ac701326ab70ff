"""Plans that keep the same total parameters, whatever rule they are by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from nirvana.allocation import allocate, checked_scores, make_plan
from nirvana.architectures import Architecture, Block
from nirvana.comparison.cases import COMMON
from nirvana.plan import PruningPlan
from nirvana.published import allocate_as_published
from nirvana.removal import Removal
from nirvana.saliency import Saliency


@dataclass(frozen=True)
class EqualPlan:
    """A plan, and how near it comes.

    Attributes:
        plan: keeps as many parameters as its target, within half an aligned step of one block.
        target: all parameters that are to stay.
        moved: how many blocks were given a step more or less than the rule alone gives them, steps counted.
    """

    plan: PruningPlan
    target: int
    moved: int

    @property
    def difference(self) -> int:
        """Parameters kept beyond the target."""
        return self.plan.totals["parameters_after"] - self.target


def target_parameters(architecture: Architecture, parameters: int, sparsity: float) -> int:
    """What is to stay of all `parameters` when `sparsity` of the prunable ones goes."""
    return parameters - round(sparsity * architecture.prunable_parameters)


def equal_plan(
    saliency: Saliency,
    architecture: Architecture,
    *,
    sparsity: float,
    scope: str,
    allocation: str,
    align: int,
    gamma: float,
) -> EqualPlan:
    """A plan by the rule `allocation` that keeps the target's parameters.

    A rule alone comes only near: "uniform" moves all layers by a step at once, 0.4 % of SmolLM2-135M; a ranking of both
    kinds jumps by a KV group; and biases go with units. From there MLPs (attention blocks, where only they are pruned)
    are moved by one step of `align` units, one after the other, while that brings the plan nearer: first those where
    the step's units are worth least, or to keep more are worth most, by their mean score relative to the block's.
    Blocks that the rule leaves whole stay whole.

    Raises:
        NirvanaError: as `nirvana.allocate`.
    """
    options = {"sparsity": sparsity, "align": align, "scope": scope, "gamma": gamma}
    rule = allocate if allocation == COMMON else allocate_as_published
    plan = rule(saliency, architecture, **options)
    target = target_parameters(architecture, plan.totals["parameters_before"], sparsity)
    scores = checked_scores(saliency, architecture)
    widths = {name: len(kept) for name, kept in plan.kept.items()}
    blocks = [b for b in architecture.blocks if b.is_attention == (scope == "attention") and widths[b.name] < b.size]
    movers = [_Mover(block, scores[block.name], align if scope != "attention" else 1) for block in blocks]
    moved = dict.fromkeys(widths, 0)
    while True:
        before, excess = dict(moved), plan.totals["parameters_after"] - target
        while moves := _moves(movers, widths, moved, excess):
            _, _, name, width, change = min(moves)
            widths[name], excess, moved[name] = width, excess + change, moved[name] + 1
        if moved == before:
            return EqualPlan(plan, target, sum(moved.values()))
        best = Removal(architecture.blocks, scores).keep([widths[block.name] for block in architecture.blocks])
        kept = {name: best[name] if moved[name] else units for name, units in plan.kept.items()}
        # Counted anew, and once more if that is not near: T5 needs more position biases when its layers become unequal.
        nearer = make_plan(architecture, kept, {**plan.settings, "steps_to_target": sum(moved.values())})
        if abs(nearer.totals["parameters_after"] - target) >= abs(plan.totals["parameters_after"] - target):
            return EqualPlan(plan, target, sum(before.values()))
        plan = nearer


def _moves(
    movers: Sequence[_Mover], widths: Mapping[str, int], moved: Mapping[str, int], excess: int
) -> list[tuple[int, float, str, int, int]]:
    """Steps that bring `excess` nearer to 0, the best to take first: (order, order, block, its width, change)."""
    moves = []
    for mover in movers:
        name = mover.block.name
        width = mover.next(widths[name], more=excess < 0)
        change = (width - widths[name]) * mover.cost
        if abs(excess + change) < abs(excess):
            worth = mover.worth(*sorted((width, widths[name])))
            moves.append((moved[name], -worth if excess < 0 else worth, name, width, change))
    return moves


class _Mover:
    """One block whose width may move."""

    def __init__(self, block: Block, scores: Tensor, align: int):
        self.block = block
        self.cost = sum(part.unit * (part.width or 1) for part in block.slices)  # a bias has no width
        self._options = Removal([block], {block.name: scores}).options(block.size, align)
        self._scores = scores.double().sort(descending=True).values
        self._scale = float(self._scores.abs().mean()) or 1.0

    def next(self, width: int, more: bool) -> int:
        """The next width, or the same where there is none."""
        if more:
            return min((option for option in self._options if option > width), default=width)
        return max((option for option in self._options if option < width), default=width)

    def worth(self, low: int, high: int) -> float:
        """Mean score of the units between two widths, relative to the block's."""
        return float(self._scores[low:high].mean()) / self._scale
