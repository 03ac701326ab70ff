"""The `cuda` backend: CUDA C++ kernels for NVIDIA GPUs, in csrc/cuda.

This side turns tensors into numbers: addresses, sizes, type codes, and for `saliency` one table for any number of
matrices. Nothing waits for the GPU; workspaces come from torch's allocator on the current stream, which does not give
them out again before the kernels are done.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nirvana import _cuda
from nirvana.ops.backends import Matrices
from nirvana.ops.backends.upload import upload
from nirvana.ops.saliency import STATISTICS

# No kernel of its own: that of Triton, where it is installed.
if importlib.util.find_spec("triton") is not None:
    from nirvana.kernels.mixture import mixture
else:
    from nirvana.ops.backends.reference_mixture import mixture

__all__ = ["build_table", "divergence", "divergence_state", "gather", "mixture", "plan_saliency", "saliency"]

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

#: (rows, columns) of a tile where axis 0 is kept and where axis 1 is, as the kernels have them.
TILES = ((8, 2048), (128, 256))
#: Most rows, and most columns, of a unit that one partial sum is of.
FOLDS = (8, 32)

# How the kernels read: 16-bit elements with 128-bit loads, any with 128-bit loads, any one by one.
_HALF, _VECTOR, _SCALAR = 0, 1, 2
_VECTOR_BYTES = 16
_WARP = 32

_READ_WEIGHT = ~STATISTICS["ntk"]
_READ_GRAD = ~(STATISTICS["magnitude"] | STATISTICS["squared"])


#: Numbers of an entry in a table.
FIELDS = 13


class Table(NamedTuple):
    """What one call of the saliency kernels needs.

    Attributes:
        values: the table itself, int64. Of each entry: weight, grad, their strides in bytes, their types, rows,
            columns, axis, group, access, partials, next entry with the same output or -1. Then the first tile of each
            entry, and their number. Of each output: address, units, first entry, units a block. Then the first block
            of each output, and their number. With one entry its numbers and those of its output alone.
        entries, outputs, tiles, blocks: numbers of these.
        workspace: fp32 elements of partial sums.
    """

    values: list[int]
    entries: int
    outputs: int
    tiles: int
    blocks: int
    workspace: int


def saliency(table: Sequence[Matrices], statistics: int) -> None:
    _Planned(table, statistics)()


def plan_saliency(table: Sequence[Matrices], statistics: int) -> _Planned:
    planned = _Planned(table, statistics)
    planned.table = [entry._replace(grad=None) for entry in table]  # whoever replaces gradients may let go of them
    return planned


class _Planned:
    """Tables on the device, or where there is one entry its numbers."""

    def __init__(self, table: Sequence[Matrices], statistics: int):
        self.table, self._statistics = table, statistics
        self._device = table[0].weight.device
        self._lay_out()

    def __call__(self, grads: Sequence[Tensor] | None = None) -> None:
        if grads is not None and self._statistics & _READ_GRAD:
            self._replace(grads)
        for plan, on_device in self._parts:
            workspace = torch.empty(plan.workspace, dtype=torch.float32, device=self._device)
            _cuda.saliency(
                0 if on_device is None else on_device.data_ptr(),
                plan.values if on_device is None else [],
                *plan[1:5],
                workspace.data_ptr(),
                self._statistics,
                *_queue(self._device),
            )

    def _lay_out(self) -> None:
        self._parts = []
        self._addresses = [0 if entry.grad is None else entry.grad.data_ptr() for entry in self.table]
        for part in _independent(self.table):
            plan = build_table(part, self._statistics)
            self._parts.append((plan, None if plan.entries == 1 else upload(plan.values, self._device)))

    def _replace(self, grads: Sequence[Tensor]) -> None:
        before, addresses = self._addresses, [grad.data_ptr() for grad in grads]
        moved = any((old ^ new) % _VECTOR_BYTES for old, new in zip(before, addresses, strict=True))
        plan, on_device = self._parts[0]
        if moved or len(self._parts) > 1 or on_device is None:
            # Another alignment may mean another access, and a part of one entry is its numbers. All or nothing: an
            # upload may be refused.
            table = [entry._replace(grad=grad) for entry, grad in zip(self.table, grads, strict=True)]
            vars(self).update(vars(plan_saliency(table, self._statistics)))
            return
        entries = on_device[: plan.entries * FIELDS].view(plan.entries, FIELDS)
        entries[:, 1].copy_(upload(addresses, self._device))
        self._addresses = addresses


def gather(weights: Sequence[Tensor], kept: Tensor, axis: int, unit: int, outs: Sequence[Tensor]) -> None:
    # A unit is counted in rows, or in bytes of columns: those of one size go together.
    calls: dict[int, list[tuple[int, int, int, int, int]]] = {}
    for weight, out in zip(weights, outs, strict=True):
        size = weight.element_size()
        row = (weight.data_ptr(), _row_bytes(weight), out.data_ptr(), out.shape[0], out.shape[1] * size)
        calls.setdefault(unit if axis == 0 else unit * size, []).append(row)
    for count, rows in calls.items():
        _cuda.gather(rows, kept.data_ptr(), axis, count, *_queue(kept.device))


def divergence(logits_p: Tensor, logits_q: Tensor, out: Tensor) -> None:
    _divergence(logits_p, logits_q, out.data_ptr(), 0)


def divergence_state(logits_p: Tensor, logits_q: Tensor, state: Tensor) -> None:
    _divergence(logits_p, logits_q, 0, state.data_ptr())


def build_table(table: Sequence[Matrices], statistics: int) -> Table:
    """The table of `saliency` for matrices on any device; a pure function of their addresses, shapes and types."""
    read_weight, read_grad = bool(statistics & _READ_WEIGHT), bool(statistics & _READ_GRAD)
    count = statistics.bit_count()
    rows: list[list[int]] = []
    tiles, partials = [0], 0
    outputs: dict[int, list[int]] = {}  # address of out -> units, first entry, last entry, units per block
    for number, (weight, grad, axis, group, out) in enumerate(table):
        height, width = weight.shape
        tile_rows, tile_columns = TILES[axis]
        down, across = -(-height // tile_rows), -(-width // tile_columns)
        weight_type = TYPES[weight.dtype]
        weight_row = [weight.data_ptr(), _row_bytes(weight), weight_type]
        grad_row = [0, 0, weight_type] if grad is None else [grad.data_ptr(), _row_bytes(grad), TYPES[grad.dtype]]
        # A matrix that no statistic reads must not decide how the other one is read.
        read = [row for row, used in ((weight_row, read_weight), (grad_row, read_grad)) if used]
        aligned = not any(address % _VECTOR_BYTES or stride % _VECTOR_BYTES for address, stride, _ in read)
        half = all(kind for _, _, kind in read)
        access = (_HALF if half else _VECTOR) if aligned else _SCALAR
        pairs = [value for pair in zip(weight_row, grad_row, strict=True) for value in pair]
        rows.append([*pairs, height, width, axis, group, access, partials, -1])
        tiles.append(tiles[-1] + down * across)
        fold = min(group & -group, FOLDS[axis])
        partials += count * (height * across if axis == 0 else width * down) // fold

        positions = group // fold
        units_a_block = _WARP // min(1 << (positions.bit_length() - 1), _WARP)
        output = outputs.setdefault(out.data_ptr(), [out.shape[1], number, number, 0])
        if output[2] != number:
            rows[output[2]][-1] = number
        output[2] = number
        output[3] = max(output[3], units_a_block)

    blocks, targets = [0], []
    for address, (units, first, _, units_a_block) in outputs.items():
        targets += [address, units, first, units_a_block]
        blocks.append(blocks[-1] - (-units // units_a_block))
    values = (
        rows[0] + targets if len(rows) == 1 else [value for row in rows for value in row] + tiles + targets + blocks
    )
    return Table(values, len(rows), len(outputs), tiles[-1], blocks[-1], partials)


def _independent(table: Sequence[Matrices]) -> list[Sequence[Matrices]]:
    """The table in parts whose outputs are equal or do not overlap: a launch adds to different ones at once."""
    spans = sorted({(out.data_ptr(), out.numel() * out.element_size()) for *_, out in table})
    if all(start + size <= after for (start, size), (after, _) in itertools.pairwise(spans)):
        return [table]
    return [[entry] for entry in table]


def _divergence(p: Tensor, q: Tensor, out: int, state: int) -> None:
    tokens, vocabulary = p.shape
    workspace = torch.empty(_cuda.divergence_workspace(tokens, vocabulary), dtype=torch.float64, device=p.device)
    _cuda.divergence(
        p.data_ptr(),
        _row_bytes(p),
        TYPES[p.dtype],
        q.data_ptr(),
        _row_bytes(q),
        TYPES[q.dtype],
        tokens,
        vocabulary,
        out,
        state,
        workspace.data_ptr(),
        *_queue(p.device),
    )


def _row_bytes(matrix: Tensor) -> int:
    """Bytes from row to row; 0 for a single row, whose stride may be any number."""
    return matrix.stride(0) * matrix.element_size() if matrix.shape[0] > 1 else 0


def _queue(device: torch.device) -> tuple[int, int]:
    """Index of the device and its current stream."""
    return device.index, torch._C._cuda_getCurrentRawStream(device.index)
