"""Reduction of weights and gradients to one score per unit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nirvana.ops.backends import Matrices, choose
from nirvana.ops.schemas import implements, traced

#: Statistic -> its bit in the masks that backends get. Rows of a result stand in the order of the bits.
STATISTICS = {
    "taylor": 1,  # sum |g w|: NIRVANA, arXiv 2509.14230
    "signed": 2,  # sum g w: first-order effect of removing the unit
    "ntk": 4,  # sum |g| = sum g sign(g): diagonal of the neural tangent kernel under Adam
    "fisher": 8,  # sum (g w)^2
    "magnitude": 16,  # sum |w|
    "squared": 32,  # sum w^2
}
_OF_WEIGHT_ALONE = STATISTICS["magnitude"] | STATISTICS["squared"]
NATIVE = (torch.float32, torch.bfloat16, torch.float16)


class SaliencyEntry(NamedTuple):
    """One reduction of `foreach_group_saliency`; the fields are the arguments of `group_saliency`."""

    weight: Tensor
    grad: Tensor | None
    axis: int
    group: int
    out: Tensor


def group_saliency(
    weight: Tensor,
    grad: Tensor | None,
    *,
    axis: int,
    group: int,
    statistics: str | Sequence[str] = "taylor",
    out: Tensor | None = None,
) -> Tensor:
    """Sums of products of `grad` and `weight` over groups of `group` consecutive rows (axis 0) or columns (axis 1).

    One pass over both tensors gives any subset of the statistics. Products and sums are in fp32 or wider whatever the
    input type: in bf16 the scores of 14 336 neurons take 348 distinct values and tie at the pruning threshold. The same
    primitive scores (activation, gradient of the activation). Source: NIRVANA, arXiv 2509.14230 (first-order saliency).

    Args:
        weight: ``[rows, columns]`` matrix, or ``[rows]`` bias with axis 0; fp32, bf16 or fp16 are read as they are,
            other floating-point types through an fp32 copy. Rows may have any stride; a matrix whose last dimension is
            not contiguous is copied first.
        grad: gradient of the objective by `weight`, same shape; any of the same types. None is allowed where only
            "magnitude" and "squared" are asked for.
        axis: the axis that is kept: 0 gives one score per group of rows, 1 one per group of columns.
        group: rows or columns per score; must divide ``weight.shape[axis]``.
        statistics: name, or several names, of `STATISTICS`: "taylor" (sum \\|g w\\|), "signed" (sum g w), "ntk"
            (sum \\|g\\|), "fisher" (sum (g w)^2), "magnitude" (sum \\|w\\|), "squared" (sum w^2).
        out: fp32 of the shape of the result; the sums are added to it.

    Returns:
        fp32 ``[units]`` for one name, ``[names, units]`` for several; `out` if given. Equal bits on every run.

    Raises:
        ValueError: shapes, types, axis, group, statistics or `out` do not fit each other.
    """
    mask, order = _statistics_mask(statistics)
    _check(weight, grad, axis, group, mask)
    shape = (weight.shape[axis] // group,)
    if order is not None:
        shape = (len(order), *shape)
    if out is not None:
        _check_out(out, shape, weight)
    with torch.no_grad():
        if traced(weight, grad, out):
            sums = torch.ops.nirvana.group_saliency(weight, grad, axis, group, mask)
        elif out is not None and out.is_contiguous() and (order is None or order == sorted(order)):
            _launch([normal_form(weight, grad, axis, group, out.view(mask.bit_count(), shape[-1]))], mask)
            return out
        else:
            sums = _one(weight, grad, axis, group, mask)
        # Rows one by one: a list as an index would be copied to a GPU first.
        sums = sums[0] if order is None else torch.stack([sums[row] for row in order])
        return sums if out is None else out.add_(sums)


def foreach_group_saliency(entries: Sequence[SaliencyEntry], *, statistics: str | Sequence[str] = "taylor") -> None:
    """`group_saliency` of many tensors at once: a layer, or a whole model, in one launch.

    For models so small that launches cost more than the work. Bits are those of one `group_saliency` an entry.

    Args:
        entries: (weight, grad, axis, group, out) each, all on one device. `out` is contiguous; entries that share one
            (gate, up and down of an MLP) are added in the order of the list.
        statistics: as for `group_saliency`; several must stand in the order of `STATISTICS`.

    Raises:
        ValueError: an entry does not fit; the message counts entries from 0.
    """
    entries = list(entries)
    mask = check_entries(entries, statistics)
    outs, targets = targets_of(entries)
    columns = [list(column) for column in zip(*(entry[:4] for entry in entries), strict=True)] or [[], [], [], []]
    with torch.no_grad():
        if traced(*outs, *columns[0], *columns[1]):
            torch.ops.nirvana.foreach_group_saliency_(outs, targets, *columns, mask)
        else:
            _foreach(outs, targets, *columns, mask)


def check_entries(
    entries: Sequence[SaliencyEntry],
    statistics: str | Sequence[str],
    further: Callable[[SaliencyEntry], None] = lambda entry: None,
) -> int:
    """The mask of `statistics`. Raises ValueError where an entry does not fit, or fails a `further` check."""
    mask, order = _statistics_mask(statistics)
    if order is not None and order != sorted(order):
        raise ValueError(f"statistics {list(statistics)} must stand in the order {', '.join(STATISTICS)}")
    for number, entry in enumerate(entries):
        try:
            weight, grad, axis, group, out = entry
            _check(weight, grad, axis, group, mask)
            shape = (weight.shape[axis] // group,)
            _check_out(out, shape if order is None else (len(order), *shape), weight)
            if not out.is_contiguous():
                raise ValueError("out must be contiguous")
            if weight.device != entries[0].weight.device:
                raise ValueError(f"weight is on {weight.device}, that of entry 0 on {entries[0].weight.device}")
            further(entry)
        except ValueError as error:
            raise ValueError(f"entry {number}: {error}") from None
    return mask


@implements("group_saliency")
def _one(weight: Tensor, grad: Tensor | None, axis: int, group: int, statistics: int) -> Tensor:
    units = weight.shape[axis] // group
    out = torch.zeros((statistics.bit_count(), units), dtype=torch.float32, device=weight.device)
    _launch([normal_form(weight, grad, axis, group, out)], statistics)
    return out


@implements("foreach_group_saliency_")
def _foreach(
    outs: list[Tensor],
    targets: list[int],
    weights: list[Tensor],
    grads: list[Tensor | None],
    axes: list[int],
    groups: list[int],
    statistics: int,
) -> None:
    rows = statistics.bit_count()
    _launch(
        [
            normal_form(weight, grad, axis, group, outs[target].view(rows, weight.shape[axis] // group))
            for weight, grad, axis, group, target in zip(weights, grads, axes, groups, targets, strict=True)
        ],
        statistics,
    )


def _launch(table: list[Matrices], statistics: int) -> None:
    # Backends never see an empty matrix: there is nothing to add.
    table = [entry for entry in table if entry.weight.numel()]
    if table:
        choose(table[0].weight.device).saliency(table, statistics)


def normal_form(weight: Tensor, grad: Tensor | None, axis: int, group: int, out: Tensor) -> Matrices:
    """What backends read: matrices with a contiguous last dimension, in one of three types."""
    if weight.dim() == 1:
        axis, weight, grad = 1, weight[None], None if grad is None else grad[None]
    return Matrices(_readable(weight), None if grad is None else _readable(grad), axis, group, out)


def _readable(matrix: Tensor) -> Tensor:
    # Lazily negated tensors and conjugates share the memory of what they are of.
    matrix = matrix.resolve_neg()
    if matrix.dtype not in NATIVE:
        matrix = matrix.float()
    # A stride of a dimension of length 1 means nothing, and contiguous() would leave it.
    return matrix if matrix.shape[1] <= 1 or matrix.stride(1) == 1 else matrix.contiguous()


def targets_of(entries: Sequence[SaliencyEntry]) -> tuple[list[Tensor], list[int]]:
    """The different outs, and for each entry the index of its own.

    Raises:
        ValueError: two outs share a part of their memory; kernels add to different outs side by side.
    """
    outs: dict[object, Tensor] = {}
    keys = []
    for entry in entries:
        # Tensors that are only recorded have no address; there only one and the same tensor counts as the same.
        key = id(entry.out) if traced(entry.out) else (entry.out.data_ptr(), entry.out.numel())
        keys.append(key)
        outs.setdefault(key, entry.out)
    spans = sorted(key for key in outs if isinstance(key, tuple) and key[1])
    for (start, size), (after, _) in itertools.pairwise(spans):
        if start + 4 * size > after:
            raise ValueError(
                "two entries have outs that overlap without being the same; give each its own, or one to both"
            )
    order = {key: number for number, key in enumerate(outs)}
    return list(outs.values()), [order[key] for key in keys]


def _statistics_mask(statistics: str | Sequence[str]) -> tuple[int, list[int] | None]:
    """The mask, and for several names the row of the kernel's result that each one is."""
    names = [statistics] if isinstance(statistics, str) else list(statistics)
    for name in names:
        if name not in STATISTICS:
            raise ValueError(f"statistic {name!r} must be one of {', '.join(STATISTICS)}")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"statistics {names} must name at least one statistic, and each one once")
    if isinstance(statistics, str):
        return STATISTICS[statistics], None
    ordered = [name for name in STATISTICS if name in names]
    return sum(STATISTICS[name] for name in names), [ordered.index(name) for name in names]


def _check(weight: Tensor, grad: Tensor | None, axis: int, group: int, mask: int) -> None:
    check_groups(weight, axis, group)
    if not weight.is_floating_point():
        raise ValueError(f"weight is {weight.dtype}: floating-point types are supported")
    if grad is None:
        if mask & ~_OF_WEIGHT_ALONE:
            raise ValueError("grad is None, which only the statistics magnitude and squared can do without")
        return
    if grad.shape != weight.shape:
        raise ValueError(f"grad has shape {list(grad.shape)}, weight {list(weight.shape)}: they must be equal")
    if not grad.is_floating_point():
        raise ValueError(f"grad is {grad.dtype}: floating-point types are supported")
    if grad.device != weight.device:
        raise ValueError(f"grad is on {grad.device}, weight on {weight.device}: they must be on one device")


def _check_out(out: Tensor, shape: tuple[int, ...], weight: Tensor) -> None:
    if out.shape != shape or out.dtype != torch.float32:
        raise ValueError(f"out is {out.dtype} {list(out.shape)}, it must be torch.float32 {list(shape)}")
    if out.device != weight.device:
        raise ValueError(f"out is on {out.device}, weight on {weight.device}: they must be on one device")


def check_groups(tensor: Tensor, axis: int, group: int) -> None:
    """Raise ValueError unless `tensor` splits along `axis` into whole groups of `group`."""
    if tensor.dim() not in (1, 2):
        raise ValueError(f"a tensor of {tensor.dim()} dimensions cannot be split into units: 1 or 2 are supported")
    if axis not in range(tensor.dim()):
        raise ValueError(f"axis {axis} does not exist in a tensor of {tensor.dim()} dimensions")
    if group < 1 or tensor.shape[axis] % group:
        raise ValueError(f"units of {group} do not divide axis {axis} of length {tensor.shape[axis]}")
