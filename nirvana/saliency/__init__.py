"""Model + calibration batch -> one score per unit."""

from nirvana.saliency.combination import WAYS, combine
from nirvana.saliency.ntk import ntk_report
from nirvana.saliency.objectives import OBJECTIVES
from nirvana.saliency.scores import Saliency
from nirvana.saliency.scoring import CRITERION_NAMES, needs_calibration, score

__all__ = ["CRITERION_NAMES", "OBJECTIVES", "WAYS", "Saliency", "combine", "needs_calibration", "ntk_report", "score"]
