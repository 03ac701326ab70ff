"""The one way of numbers from the host to the memory of a GPU: tables of addresses and sizes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nirvana.errors import NirvanaError


def upload(values: Sequence[int], device: torch.device) -> Tensor:
    """int64 vector on `device`. The copy does not wait for the device: it leaves from pinned memory.

    Raises:
        NirvanaError: a CUDA graph is being captured. Each replay would copy again from memory that is given back when
            this call returns.
    """
    with torch.inference_mode(False):  # a plan that was made inside of it is given other gradients outside
        return _upload(values, device)


def _upload(values: Sequence[int], device: torch.device) -> Tensor:
    if device.type != "cuda":
        return torch.tensor(values, dtype=torch.int64, device=device)
    if torch.cuda.is_current_stream_capturing():
        raise NirvanaError(
            f"a table of {len(values)} numbers cannot be uploaded while a CUDA graph is captured: capture calls of one "
            "tensor each, or make a plan before the capture (nirvana.ops.plan_group_saliency) and call it inside"
        )
    return torch.tensor(values, dtype=torch.int64, pin_memory=True).to(device, non_blocking=True)
