"""Tensor operators: the primitives under scoring, slicing and comparing. They know tensors, not models.

Each operator has a pure-PyTorch reference (`backends/reference.py`) that specifies it, and kernels of the same meaning:
C++ for CPU tensors, Triton and CUDA for GPU tensors. `use_backend` forces one; `status` says what is there.

Promise of every backend: the same input gives the same bits on every run, for any number of threads, and for
`foreach_group_saliency` and plans the bits of one `group_saliency` an entry. Between backends the bits of sums differ
(their summation trees differ), within fp32 rounding; `gather_slice` copies, so its bits are equal everywhere.
"""

from nirvana.ops.backends import status, use_backend
from nirvana.ops.divergence import kl_divergence, linear_kl_divergence
from nirvana.ops.gather import gather_slice
from nirvana.ops.mixture import MixtureBounds, mixture_bounds
from nirvana.ops.saliency import STATISTICS, SaliencyEntry, foreach_group_saliency, group_saliency
from nirvana.ops.saliency_plan import SaliencyPlan, plan_group_saliency

__all__ = [
    "STATISTICS",
    "MixtureBounds",
    "SaliencyEntry",
    "SaliencyPlan",
    "foreach_group_saliency",
    "gather_slice",
    "group_saliency",
    "kl_divergence",
    "linear_kl_divergence",
    "mixture_bounds",
    "plan_group_saliency",
    "status",
    "use_backend",
]
