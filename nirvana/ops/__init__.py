"""Tensor operators: the primitives under scoring and slicing. They know tensors, not models."""

from nirvana.ops.gather import gather_slice
from nirvana.ops.saliency import group_saliency

__all__ = ["gather_slice", "group_saliency"]
