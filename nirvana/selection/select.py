"""Candidate batches -> the one whose pruned model stays closest to the dense one on the probe.

For each candidate: saliency -> plan -> masked model on the probe. Nothing is reloaded or copied: a candidate costs one
scoring pass and one forward pass over the probe.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from nirvana.allocation import allocate
from nirvana.architectures import describe
from nirvana.calibration import CalibrationBatch
from nirvana.calibration.manifest import batch_settings, tokens_sha256
from nirvana.errors import NirvanaError
from nirvana.masking import masked
from nirvana.plan import PruningPlan
from nirvana.progress import Progress
from nirvana.saliency import CRITERION_NAMES, Saliency, needs_calibration, score
from nirvana.selection.probe import Probe
from nirvana.selection.state import SelectionState, model_fingerprint
from nirvana.widths import WidthRule


@dataclass(frozen=True)
class Candidate:
    """What one candidate came to.

    Attributes:
        index: place among the candidates.
        source: corpus of its batch, or ``a+b`` for a mixture.
        kl, perplexity: of its pruned model on the probe, see `ProbeResult`.
        score_seconds, probe_seconds: time of its scoring pass; of planning and of the pass over the probe.
        tokens_sha256: of its batch.
    """

    index: int
    source: str
    kl: float
    perplexity: float
    score_seconds: float
    probe_seconds: float
    tokens_sha256: str


@dataclass(frozen=True)
class Selection:
    """All candidates, and what the best one leads to.

    Attributes:
        candidates: in the order in which they were given.
        best: index of the one with the smallest KL; of equal ones the first.
        saliency: of the best.
        plan: of the best.
        dense_perplexity: of the dense model on the probe.
        resumed: how many candidates came out of the state file.
    """

    candidates: tuple[Candidate, ...]
    best: int
    saliency: Saliency = field(repr=False)
    plan: PruningPlan = field(repr=False)
    dense_perplexity: float
    resumed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without saliency and plan."""
        return {
            "best": self.best,
            "dense_perplexity": self.dense_perplexity,
            "candidates": [asdict(candidate) for candidate in self.candidates],
        }


def select(
    model: PreTrainedModel,
    candidates: Sequence[CalibrationBatch],
    probe: Probe,
    rule: WidthRule,
    *,
    criterion: str = "nirvana",
    objective: str | None = None,
    micro_batch: int | None = None,
    seed: int = 0,
    state: str | Path | None = None,
    progress: Progress | None = None,
) -> Selection:
    """Score, plan and probe every candidate.

    Args:
        model: dense; left as it was found.
        candidates: see `draw_candidates`.
        probe: of this model, on tokens that are in no candidate.
        rule: how wide blocks become: the arguments of `nirvana.allocate`.
        criterion, objective, micro_batch: see `nirvana.score`.
        seed: goes into the saliency's settings.
        state: file in which finished candidates are kept. An interrupted selection goes on from there, with the same
            result. The caller removes it.
        progress: told how far the work is; silent by default.

    Raises:
        NirvanaError: no candidates, a criterion that needs no calibration, or a `state` of another selection.
    """
    progress = progress or Progress()
    if not candidates:
        raise NirvanaError("--candidates 0 must be at least 1; 8 is a good number")
    check_criterion(criterion)
    if probe.model is not model:
        raise NirvanaError("the probe was made with another model; make one with this model")
    hashes = [tokens_sha256(batch.tokens) for batch in candidates]
    identity: dict[str, Any] = {}
    if state is not None:
        # Not the micro-batch: it changes nothing but rounding, and who ran out of memory goes on with a smaller one.
        identity = {"model": model_fingerprint(model), "probe": tokens_sha256(probe.tokens), "candidates": hashes}
        identity |= {"criterion": criterion, "objective": objective or "of the criterion", "seed": seed}
        identity |= asdict(rule)
    kept = SelectionState(state, identity)
    table = [Candidate(**record) for record in kept.table]
    best = kept.best
    steps = 1 + sum(part.scored for block in describe(model).blocks for part in block.slices)
    with progress.stage("select", steps * len(candidates)) as advance:
        advance(steps * len(table))
        for index in range(len(table), len(candidates)):
            batch = candidates[index]
            started = time.perf_counter()
            saliency = score(
                model,
                batch.tokens,
                criterion=criterion,
                objective=objective,
                micro_batch=micro_batch,
                progress=lambda: advance(1),
            )
            scored = time.perf_counter()
            with masked(model, allocate(saliency, model, **asdict(rule))):
                result = probe.divergence()
            seconds = scored - started, time.perf_counter() - scored
            source = str(batch.manifest["source"])
            table.append(Candidate(index, source, result.kl, result.perplexity, *seconds, hashes[index]))
            if best is None or result.kl < min(candidate.kl for candidate in table[:-1]):
                best = saliency
            kept.save([asdict(candidate) for candidate in table], best)
            advance(1)
    winner = min(table, key=lambda candidate: candidate.kl)
    best.settings |= batch_settings([candidates[winner.index].manifest], seed)
    best.settings["selection"] = {"candidate": winner.index, "of": len(table), "kl": winner.kl}
    plan = allocate(best, model, **asdict(rule))
    return Selection(tuple(table), winner.index, best, plan, probe.dense().perplexity, len(kept.table))


def check_criterion(criterion: str) -> None:
    """Raise NirvanaError where calibration decides nothing. An unknown name is for `nirvana.score` to refuse."""
    if criterion in CRITERION_NAMES and not needs_calibration(criterion):
        raise NirvanaError(
            f"--criterion {criterion} needs no calibration batch, so there is nothing to select from; "
            "give another criterion or leave --candidates out"
        )
