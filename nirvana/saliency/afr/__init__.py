"""AFR: weights scored by what they do to the features (ReFer) and to the loss (SNIP), and units by their weights.

A weight w has two first-order terms, dF/dw w and dL/dw w (`gradients`), which are standardised and added (`terms`). A
unit's score is one of four aggregations of its weights' scores (`forms`, `units`).
"""

from nirvana.saliency.afr.forms import ABS, ABS_GMM, FORMS, GMM, MEAN
from nirvana.saliency.afr.polar import polar_factor
from nirvana.saliency.afr.refer import walk_features
from nirvana.saliency.afr.saliencies import score_forms
from nirvana.saliency.afr.weights import weight_scores

__all__ = [
    "ABS",
    "ABS_GMM",
    "FORMS",
    "GMM",
    "MEAN",
    "polar_factor",
    "score_forms",
    "walk_features",
    "weight_scores",
]
