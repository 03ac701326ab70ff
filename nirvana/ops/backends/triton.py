"""The `triton` backend: NVIDIA GPUs, or CPU tensors under TRITON_INTERPRET=1 for tests of the numerics."""

from nirvana.kernels.divergence import divergence, divergence_state
from nirvana.kernels.gather import gather
from nirvana.kernels.mixture import mixture
from nirvana.kernels.saliency import plan_saliency, saliency

__all__ = ["divergence", "divergence_state", "gather", "mixture", "plan_saliency", "saliency"]
