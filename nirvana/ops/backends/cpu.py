"""The `cpu` backend: C++ kernels (csrc/cpu) for CPU tensors. Thread count from torch.

The module gets integers: addresses, sizes, strides, type codes. The caller holds the tensors while it works.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nirvana import _cpu
from nirvana.ops.backends import Matrices

#: DType in csrc/cpu/saliency.h
_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def saliency(table: Sequence[Matrices], statistics: int) -> None:
    plan_saliency(table, statistics)()


def plan_saliency(table: Sequence[Matrices], statistics: int) -> _Planned:
    return _Planned(table, statistics)


class _Planned:
    #: weight and grad (address, type, row stride), rows, columns, axis, group, address of out
    FIELDS = 11

    def __init__(self, table: Sequence[Matrices], statistics: int):
        self._statistics = statistics
        self._rows: list[int] = []
        for weight, grad, axis, group, out in table:
            # A statistic of the weight alone reads no gradient; the kernel then gets the weight twice.
            grad = weight if grad is None else grad
            self._rows += [*_matrix(weight), *_matrix(grad), *weight.shape, axis, group, out.data_ptr()]

    def __call__(self, grads: Sequence[Tensor | None] | None = None) -> None:
        for row, grad in enumerate(grads or ()):
            if grad is not None:
                self._rows[row * self.FIELDS + 3] = grad.data_ptr()
        _cpu.group_saliency(self._rows, self._statistics, torch.get_num_threads())


def gather(weights: Sequence[Tensor], kept: Tensor, axis: int, unit: int, outs: Sequence[Tensor]) -> None:
    rows: list[int] = []
    for weight, out in zip(weights, outs, strict=True):
        size = weight.element_size()
        length = weight.shape[1] * size
        rows += [weight.data_ptr(), weight.stride(0) * size, weight.shape[0], length, size, out.data_ptr()]
    _cpu.gather_slice(rows, kept.data_ptr(), len(kept), axis, unit, torch.get_num_threads())


def divergence(logits_p: Tensor, logits_q: Tensor, out: Tensor) -> None:
    _divergence(logits_p, logits_q, out.data_ptr(), 0)


def divergence_state(logits_p: Tensor, logits_q: Tensor, state: Tensor) -> None:
    _divergence(logits_p, logits_q, 0, state.data_ptr())


def mixture(
    scores: Tensor, max_components: int, low_density: int, low: Tensor, high: Tensor, components: Tensor
) -> None:
    addresses = [tensor.data_ptr() for tensor in (scores, low, high, components)]
    _cpu.mixture_bounds(*addresses, *scores.shape, max_components, low_density, torch.get_num_threads())


def _divergence(logits_p: Tensor, logits_q: Tensor, out: int, state: int) -> None:
    matrices = [*_matrix(logits_p), *_matrix(logits_q)]
    _cpu.kl_divergence(matrices, *logits_p.shape, out, state, torch.get_num_threads())


def _matrix(tensor: Tensor) -> tuple[int, int, int]:
    return tensor.data_ptr(), _CODES[tensor.dtype], tensor.stride(0)
