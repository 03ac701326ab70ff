"""Which calibration batch, and which gamma: decided by the pruned model's KL divergence on a held-out probe."""

from nirvana.selection.candidates import Candidates, draw_candidates
from nirvana.selection.gamma import GammaSearch, check_search, search_gamma
from nirvana.selection.probe import Probe, ProbeResult
from nirvana.selection.select import Candidate, Selection, check_criterion, select

__all__ = [
    "Candidate",
    "Candidates",
    "GammaSearch",
    "Probe",
    "ProbeResult",
    "Selection",
    "check_criterion",
    "check_search",
    "draw_candidates",
    "search_gamma",
    "select",
]
