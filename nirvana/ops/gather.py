"""Copy of the kept units of a weight into a new contiguous tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nirvana.ops.saliency import check_groups


@torch.no_grad()
def gather_slice(weight: Tensor, kept: Tensor | Sequence[int], *, axis: int, unit: int = 1) -> Tensor:
    """The units `kept` of `weight`, each `unit` consecutive rows (axis 0) or columns (axis 1), in the order given.

    Args:
        weight: ``[rows, columns]`` matrix or ``[rows]`` bias, any type, any device; a memory-mapped tensor too.
        kept: unit indices, int64.
        axis: 0 to gather rows, 1 to gather columns.
        unit: rows or columns per unit; must divide ``weight.shape[axis]``.

    Returns:
        A new contiguous tensor that shares no memory with `weight`, bit-equal to the gathered parts.

    Raises:
        ValueError: `unit` does not divide the axis, or an index is out of range.
    """
    check_groups(weight, axis, unit)
    units = torch.as_tensor(kept, device=weight.device)
    if units.numel() and (units.dtype == torch.bool or units.dtype.is_floating_point):
        raise ValueError(f"kept must hold unit indices, not {units.dtype}; of a mask take mask.nonzero()[:, 0]")
    units = units.to(torch.int64)
    size = weight.shape[axis] // unit
    if units.numel() and not (int(units.min()) >= 0 and int(units.max()) < size):
        raise ValueError(f"kept units must lie in 0..{size - 1}, got {int(units.min())}..{int(units.max())}")
    grouped = weight.unflatten(axis, (size, unit))
    return grouped.index_select(axis, units).flatten(axis, axis + 1).contiguous()
