"""Methods of other papers that make no nirvana plan: pruned models in memory, for comparison only.

Masks of single weights, dropped layers and a narrower residual stream cannot be said in units of blocks, so they go
through no plan, no slicing and no checkpoint. They stand beside the criteria where models are compared at equal size.
"""

from __future__ import annotations

import functools

from nirvana.references import afr, magnitude, shortgpt, slicegpt, sparsegpt, wanda
from nirvana.references.base import PrunedReference, Reference
from nirvana.references.by_scores import mask_by_scores

__all__ = ["REFERENCES", "PrunedReference", "Reference", "mask_by_scores"]

REFERENCES: dict[str, Reference] = {
    "wanda": Reference(wanda.prune),
    "wanda-2:4": Reference(functools.partial(wanda.prune, two_of_four=True)),
    "sparsegpt": Reference(sparsegpt.prune),
    "sparsegpt-2:4": Reference(functools.partial(sparsegpt.prune, two_of_four=True)),
    "magnitude-unstructured": Reference(magnitude.prune),
    "afr-unstructured": Reference(afr.prune),
    "shortgpt": Reference(shortgpt.prune, shortgpt.SCOPES),
    "slicegpt": Reference(slicegpt.prune, slicegpt.SCOPES),
}
