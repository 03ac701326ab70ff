"""Copy of the kept units of weights into new contiguous tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from nirvana.ops.backends import choose
from nirvana.ops.saliency import check_groups
from nirvana.ops.schemas import implements, traced


@overload
def gather_slice(weight: Tensor, kept: Tensor | Sequence[int], *, axis: int, unit: int = 1) -> Tensor: ...
@overload
def gather_slice(
    weight: Sequence[Tensor], kept: Tensor | Sequence[int], *, axis: int, unit: int = 1
) -> list[Tensor]: ...


def gather_slice(weight, kept, *, axis, unit=1):
    """The units `kept` of `weight`, each `unit` consecutive rows (axis 0) or columns (axis 1), in the order given.

    Args:
        weight: ``[rows, columns]`` matrix or ``[rows]`` bias, any type, any device; a memory-mapped tensor too. Or
            several of these on one device that lose the same units (gate and up): one launch serves them all.
        kept: unit indices, int64. While a CUDA graph is captured they must be on the device, and nobody looks whether
            they are in range: that would be to wait for the device, which a capture does not allow.
        axis: 0 to gather rows, 1 to gather columns.
        unit: rows or columns per unit; must divide ``weight.shape[axis]``.

    Returns:
        A new contiguous tensor (a list for several) that shares no memory with `weight`, bit-equal to its parts.

    Raises:
        ValueError: `unit` does not divide the axis, or an index is out of range.
    """
    weights = [weight] if isinstance(weight, Tensor) else list(weight)
    for one in weights:
        check_groups(one, axis, unit)
        if one.device != weights[0].device:
            raise ValueError(f"weights are on {one.device} and {weights[0].device}: they must be on one device")
    units = torch.as_tensor(kept)
    if units.numel() and (units.dtype == torch.bool or units.dtype.is_floating_point):
        raise ValueError(f"kept must hold unit indices, not {units.dtype}; of a mask take mask.nonzero()[:, 0]")
    if units.dim() != 1:
        raise ValueError(f"kept has {units.dim()} dimensions, it must be a vector of unit indices")
    units = units.to(torch.int64)
    if not weights:
        return []
    with torch.no_grad():
        if traced(*weights):
            results = torch.ops.nirvana.gather_slice(weights, units, axis, unit)
        else:
            results = _gather(weights, units, axis, unit)
    return results[0] if isinstance(weight, Tensor) else results


@implements("gather_slice")
def _gather(weights: list[Tensor], kept: Tensor, axis: int, unit: int) -> list[Tensor]:
    device = weights[0].device
    captured = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if captured and kept.device != device:
        raise ValueError(f"kept is on {kept.device} while a CUDA graph is captured: move it to {device} before that")
    if kept.numel() and not captured:
        # Here and not above, because torch.compile cannot look at values. On a GPU this waits for the indices once.
        low, high = (int(value) for value in kept.aminmax())
        size = min(weight.shape[axis] // unit for weight in weights)
        if low < 0 or high >= size:
            raise ValueError(f"kept units must lie in 0..{size - 1}, got {low}..{high}")
    kept = kept.to(device).contiguous()
    results = []
    for weight in weights:
        shape = list(weight.shape)
        shape[axis] = len(kept) * unit
        results.append(weight.new_empty(shape))
    # A bias is a matrix of one row, whose columns are gathered whatever `axis` says.
    for of_bias in (False, True):
        # Backends never see an empty result.
        chosen = [i for i, weight in enumerate(weights) if (weight.dim() == 1) == of_bias and results[i].numel()]
        if chosen:
            matrices = [_readable(weights[index][None] if of_bias else weights[index]) for index in chosen]
            outs = [results[index][None] if of_bias else results[index] for index in chosen]
            choose(kept.device).gather(matrices, kept, 1 if of_bias else axis, unit, outs)
    return results


def _readable(matrix: Tensor) -> Tensor:
    # Kernels copy bytes; lazily negated tensors and conjugates share the memory of what they are of.
    matrix = matrix.resolve_neg().resolve_conj()
    return matrix if matrix.shape[1] <= 1 or matrix.stride(1) == 1 else matrix.contiguous()
