"""How a plan is arrived at: which scores, how many calibration batches, how many steps, what repair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nirvana.errors import NirvanaError
from nirvana.repair import LEAST_SQUARES, NONE, RIDGE, check_repair
from nirvana.saliency import needs_calibration
from nirvana.saliency.combination import WAYS

AUTO = "auto"

#: Options of `nirvana.prune` that belong together. "best" is the winner of benchmarks/quality.py.
PRESETS: dict[str, dict[str, Any]] = {
    "best": {
        "criterion": "nirvana+mask-fisher",
        "gamma": AUTO,
        "repair": LEAST_SQUARES,
    },
}


def preset(name: str) -> dict[str, Any]:
    """Keyword arguments of `nirvana.prune`, e.g. ``nirvana.prune(model, 0.4, **nirvana.preset("best"))``.

    Raises:
        NirvanaError: unknown name.
    """
    if name not in PRESETS:
        raise NirvanaError(f"--preset {name!r} is unknown; known is {', '.join(PRESETS)}")
    return dict(PRESETS[name])


@dataclass(frozen=True)
class Recipe:
    """The arguments of `nirvana.prune` that say how scores are made and used.

    Raises:
        NirvanaError: one is out of range, or two of them contradict each other.
    """

    criterion: str = "nirvana"
    objective: str | None = None
    micro_batch: int | None = None
    seed: int = 0
    batches: int = 1
    combine: str = "mean"
    candidates: int = 1
    search_gamma: bool = False
    steps: int = 1
    repair: str | None = None
    repair_ridge: float = RIDGE
    repair_strength: float | str = 1.0
    ntk: bool = False

    def __post_init__(self) -> None:
        if self.batches < 1:
            raise NirvanaError(f"--batches {self.batches} must be at least 1")
        if self.candidates < 1:
            raise NirvanaError(f"--candidates {self.candidates} must be at least 1; 8 is a good number")
        if self.batches > 1 and self.candidates > 1:
            raise NirvanaError(
                f"--batches {self.batches} combines, --candidates {self.candidates} chooses: give one of both"
            )
        if self.combine not in WAYS:
            raise NirvanaError(f"--combine {self.combine!r} is unknown; known are {', '.join(WAYS)}")
        if self.steps < 1:
            raise NirvanaError(f"--steps {self.steps} must be at least 1; 4 is a good number")
        if self.steps > 1 and not needs_calibration(self.criterion):
            raise NirvanaError(
                f"--steps {self.steps} scores again what is left, and {self.criterion} would give the same scores; "
                "use --steps 1"
            )
        if self.repair is not None:
            check_repair(self.repair, self.repair_ridge)
        if self.repair_strength != AUTO and not (
            isinstance(self.repair_strength, int | float) and 0 <= self.repair_strength <= 1
        ):
            raise NirvanaError(f"--repair-strength {self.repair_strength} must be a number from 0 to 1, or auto")

    @property
    def scoring(self) -> dict[str, Any]:
        """Arguments of `nirvana.score`."""
        return {name: getattr(self, name) for name in ("criterion", "objective", "micro_batch", "seed")}

    @property
    def repairs(self) -> bool:
        """Whether weights of output layers change."""
        return self.repair_method != NONE

    @property
    def changes_weights(self) -> bool:
        """Whether output layers of the dense model are changed, if only between steps."""
        return self.repairs or self.steps > 1

    @property
    def goes_back(self) -> bool:
        """Whether the dense output layers are needed again after they were changed."""
        return self.steps > 1 or (self.repairs and (self.repair_strength != 1 or self.ntk))

    @property
    def repair_method(self) -> str:
        """Least squares unless said otherwise, for criteria that read calibration data anyway."""
        if self.repair is None:
            return LEAST_SQUARES if needs_calibration(self.criterion) else NONE
        return self.repair

    @property
    def needs_tokens(self) -> bool:
        """Whether a calibration batch is read at all."""
        return needs_calibration(self.criterion) or self.repairs or self.needs_probe

    @property
    def needs_probe(self) -> bool:
        """Whether something is decided, or reported, by what the model does on held-out tokens."""
        searched = self.repairs and self.repair_strength == AUTO
        return self.candidates > 1 or self.search_gamma or searched or self.ntk
