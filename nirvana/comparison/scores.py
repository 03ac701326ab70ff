"""What the criteria of a comparison give each unit: every pass over the model is made once."""

from __future__ import annotations

from collections.abc import Sequence

from nirvana.comparison.bench import Bench
from nirvana.comparison.record import Record
from nirvana.errors import NirvanaError
from nirvana.progress import Progress
from nirvana.saliency import Saliency
from nirvana.saliency.criteria import CRITERIA
from nirvana.saliency.kinds import PairCriterion
from nirvana.saliency.scoring import score_of_sum


class Scores:
    """Scores, from the record or made when they are asked for.

    A sum of criteria is made of its parts' scores. Criteria on pairs (AFR's forms) differ in what they do with the same
    two walks through the model, so that all of the comparison are scored in one pair of walks.
    """

    def __init__(self, record: Record, bench: Bench, criteria: Sequence[str], progress: Progress):
        """`criteria` are all that will be asked for."""
        self._record, self._bench, self._progress = record, bench, progress
        self._single = list(dict.fromkeys(part for name in criteria for part in name.split("+")))
        self._found: dict[str, Saliency | NirvanaError] = {}

    def of(self, criterion: str) -> Saliency | NirvanaError:
        """Scores of a criterion, or why it has none.

        Raises:
            NirvanaError: its file in the record is damaged.
        """
        if criterion not in self._found:
            kept = self._record.saliency(criterion)
            if kept is not None:
                self._found[criterion] = kept
            elif "+" in criterion:
                self._found[criterion] = self._sum(criterion)
            else:
                self._score(criterion)
        return self._found[criterion]

    def _sum(self, criterion: str) -> Saliency | NirvanaError:
        names = criterion.split("+")
        parts = [self.of(name) for name in names]
        for part in parts:
            if isinstance(part, NirvanaError):
                return part
        saliency = score_of_sum(criterion, parts, self._bench.architecture)
        costs = [self._record.document["scoring"][name] for name in names]
        figures = {
            "seconds": sum(cost["seconds"] for cost in costs),
            "peak_bytes": max(cost["peak_bytes"] for cost in costs),
            "reads_calibration": any(cost["reads_calibration"] for cost in costs),
        }
        self._record.put_saliency(criterion, saliency, figures)
        return saliency

    def _score(self, criterion: str) -> None:
        together = [criterion, *self._companions(criterion)]
        more = f" and {len(together) - 1} more" if len(together) > 1 else ""
        with self._progress.stage(f"score {criterion}{more}", self._bench.scored_tensors) as step:
            try:
                scores, figures = self._bench.score(together, lambda: step(1))
            except NirvanaError as error:
                self._found |= dict.fromkeys(together, error)
                return
        if more:
            figures["together"] = together
        for name, saliency in scores.items():
            self._found[name] = saliency
            self._record.put_saliency(name, saliency, figures)

    def _companions(self, criterion: str) -> list[str]:
        """What the same walks score too."""
        rule = CRITERIA.get(criterion)
        if not isinstance(rule, PairCriterion):
            return []
        others = [name for name in self._single if name != criterion and name not in self._found]
        return [
            name
            for name in others
            if isinstance(CRITERIA.get(name), PairCriterion)
            and CRITERIA[name].objective == rule.objective
            and self._record.saliency(name) is None
        ]
