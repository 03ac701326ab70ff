"""The `torch` backend: the specification of every operator, short and obviously right, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nirvana.ops.backends import Matrices
from nirvana.ops.backends.reference_mixture import mixture
from nirvana.ops.saliency import STATISTICS

__all__ = ["divergence", "divergence_state", "gather", "mixture", "plan_saliency", "saliency"]

_TERMS = {
    "taylor": lambda w, g: (g * w).abs_(),
    "signed": lambda w, g: g * w,
    "ntk": lambda w, g: g.abs(),
    "fisher": lambda w, g: (g * w).square_(),
    "magnitude": lambda w, g: w.abs(),
    "squared": lambda w, g: w.square(),
}


def saliency(table: Sequence[Matrices], statistics: int) -> None:
    for weight, grad, axis, group, out in table:
        # Upcast first: the product of two bf16 numbers does not fit bf16.
        weight, grad = weight.float(), None if grad is None else grad.float()
        names = [name for name, bit in STATISTICS.items() if statistics & bit]
        for row, name in zip(out, names, strict=True):
            row += _sum(_sum(_TERMS[name](weight, grad), 1 - axis).view(-1, group), 1)


def plan_saliency(table: Sequence[Matrices], statistics: int) -> _Planned:
    return _Planned(table, statistics)


class _Planned:
    def __init__(self, table: Sequence[Matrices], statistics: int):
        self._table, self._statistics = table, statistics

    def __call__(self, grads: Sequence[Tensor | None] | None = None) -> None:
        if grads is not None:
            self._table = [entry._replace(grad=grad) for entry, grad in zip(self._table, grads, strict=True)]
        saliency(self._table, self._statistics)


def gather(weights: Sequence[Tensor], kept: Tensor, axis: int, unit: int, outs: Sequence[Tensor]) -> None:
    for weight, out in zip(weights, outs, strict=True):
        out.copy_(weight.unflatten(axis, (-1, unit)).index_select(axis, kept).flatten(axis, axis + 1))


def divergence(logits_p: Tensor, logits_q: Tensor, out: Tensor) -> None:
    log_p = torch.log_softmax(logits_p.float(), dim=-1)
    log_q = torch.log_softmax(logits_q.float(), dim=-1)
    out.copy_(_sum(_weighted(log_p.exp(), log_p, log_q), -1))


def divergence_state(logits_p: Tensor, logits_q: Tensor, state: Tensor) -> None:
    p, q = logits_p.double(), logits_q.double()
    max_p, max_q = p.amax(dim=-1), q.amax(dim=-1)
    # A chunk of -inf alone has no finite maximum: its sums are 0.
    e_p = torch.where(p == -torch.inf, 0.0, (p - max_p[:, None]).exp())
    e_q = torch.where(q == -torch.inf, 0.0, (q - max_q[:, None]).exp())
    torch.stack([max_p, _sum(e_p, -1), _sum(_weighted(e_p, p, q), -1), max_q, _sum(e_q, -1)], out=state)


def _weighted(probability: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """probability * (p - q): 0 where p excludes a word, infinite where q alone does, however small the probability."""
    product = torch.where(p - q == torch.inf, torch.inf, probability * (p - q))
    return torch.where(p == -torch.inf, 0.0, product)


def _sum(terms: Tensor, dim: int) -> Tensor:
    # In parts, because torch splits a sum of more than 32 767 terms to one value between its threads.
    return torch.stack([part.sum(dim) for part in terms.split(16384, dim)]).sum(dim=0)
