"""The `triton` backend: NVIDIA GPUs, or CPU tensors under TRITON_INTERPRET=1 for tests of the numerics."""

from nirvana.kernels.divergence import divergence, divergence_state
from nirvana.kernels.gather import gather
from nirvana.kernels.saliency import saliency
from nirvana.ops.backends.reference_mixture import mixture  # no kernel of its own yet

__all__ = ["divergence", "divergence_state", "gather", "mixture", "saliency"]
