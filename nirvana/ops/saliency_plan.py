"""Sums of the same tensors time and again: what `foreach_group_saliency` does before it adds, done once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from nirvana.ops.backends import choose
from nirvana.ops.saliency import NATIVE, SaliencyEntry, check_entries, normal_form, targets_of
from nirvana.ops.schemas import traced


class SaliencyPlan:
    """What `plan_group_saliency` gives.

    ``plan()`` adds to each `out` the sums of what the tensors hold now, with the bits of `foreach_group_saliency`.
    ``plan(grads=[...])`` does so with other gradients, one an entry, on the same device, of the types, shapes and
    strides of the first ones, which must be equal (ValueError); they stay those of the plan. Nothing else is checked,
    and nothing is copied to a GPU but the addresses of new gradients. So ``plan()`` can be captured in a CUDA graph, on
    whose replays it reads the tensors anew; ``plan(grads=...)`` cannot, unless the plan has one entry alone. A graph
    does not hold the plan, and knows the tables and gradients of its capture alone: keep the plan as long as the graph
    is replayed, and give it no other gradients meanwhile. A plan can neither be copied nor pickled.

    A plan holds the memory of its tensors, of gradients that of the last ones, and reads and writes that memory even
    if a tensor has been given another (``parameter.data = ...``). Run it on the stream on which it was made, or on one
    that waits for that.
    """

    def __init__(self, entries: Sequence[SaliencyEntry], statistics: int):
        # Aliases: whoever gives a tensor other memory must not free what the plan reads.
        table = [
            normal_form(
                weight.detach(),
                None if grad is None else grad.detach(),
                axis,
                group,
                out.detach().view(statistics.bit_count(), weight.shape[axis] // group),
            )
            for weight, grad, axis, group, out in entries
        ]
        self._forms = [None if entry.grad is None else _form(entry.grad) for entry in entries]
        self._full = [number for number, entry in enumerate(table) if entry.weight.numel()]
        table = [table[number] for number in self._full]
        self._held = [(entry.weight, entry.out) for entry in table]
        self._grads: object = [entry.grad for entry in table]
        self._run = None
        if table:
            self._run = choose(table[0].weight.device).plan_saliency(table, statistics)

    def __call__(self, grads: Sequence[Tensor | None] | None = None) -> None:
        _refuse_tracing(grads or ())
        full = None
        if grads is not None:
            self._check(grads)
            full = [_matrix(grads[number]) for number in self._full]
        if self._run is None:
            return
        held = full or self._grads
        self._grads = [self._grads, held]  # whichever the addresses are of, should the call fail
        with torch.no_grad():
            self._run(full)
        self._grads = held

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        # A copy would write to the addresses of this one.
        raise TypeError("a plan of group_saliency cannot be copied or pickled: make another one of the same entries")

    def _check(self, grads: Sequence[Tensor | None]) -> None:
        if len(grads) != len(self._forms):
            raise ValueError(f"{len(grads)} gradients for a plan of {len(self._forms)} entries: give one an entry")
        for number, (grad, form) in enumerate(zip(grads, self._forms, strict=True)):
            if (None if grad is None else _form(grad)) != form:
                raise ValueError(
                    f"entry {number}: grad is {_text(grad)}, the plan was made for {_text(form)}; make another plan"
                )


def plan_group_saliency(
    entries: Sequence[SaliencyEntry], *, statistics: str | Sequence[str] = "taylor"
) -> SaliencyPlan:
    """`foreach_group_saliency` of these tensors, checked and laid out once: see `SaliencyPlan`. Nothing is added yet.

    For the same model time and again, where checking 210 matrices takes longer than a GPU needs for them; and for CUDA
    graphs. The backend is the one that serves now. A plan cannot be compiled: call it outside of what is.

    Args:
        entries, statistics: as for `foreach_group_saliency`. Tensors are read where they lie, so a weight or gradient
            that would be copied first is refused: other types than fp32, bf16 and fp16, columns that lie apart.

    Raises:
        ValueError: an entry does not fit; the message counts entries from 0.
        RuntimeError: inside of what torch.compile or export traces.
    """
    entries = list(entries)  # an iterator would be empty the second time
    _refuse_tracing(tensor for entry in entries for tensor in (entry.weight, entry.grad, entry.out))
    mask = check_entries(entries, statistics, _check_in_place)
    targets_of(entries)
    return SaliencyPlan(entries, mask)


def _check_in_place(entry: SaliencyEntry) -> None:
    for name in ("weight", "grad"):
        tensor = getattr(entry, name)
        if tensor is None:
            continue
        remedy = "a plan reads tensors where they lie: plan a copy, or call foreach_group_saliency"
        if tensor.dtype not in NATIVE:
            raise ValueError(f"{name} is {tensor.dtype}, not torch.float32, torch.bfloat16 or torch.float16; {remedy}")
        if tensor.is_neg() or (tensor.shape[-1] > 1 and tensor.stride(-1) != 1):
            raise ValueError(f"{name} is not contiguous in its last dimension, or lazily negated; {remedy}")


def _matrix(grad: Tensor | None) -> Tensor | None:
    """An alias, for the same reason as those of the first tensors; a bias as a matrix of one row."""
    if grad is None:
        return None
    grad = grad.detach()
    return grad[None] if grad.dim() == 1 else grad


def _refuse_tracing(tensors: Iterable[Tensor | None]) -> None:
    if traced(*tensors):
        raise RuntimeError(
            "a plan of group_saliency cannot be compiled or exported: call it outside, or foreach_group_saliency inside"
        )


#: dtype, shape, strides, device, whether lazily negated
_Form = tuple[torch.dtype, torch.Size, tuple[int, ...], torch.device, bool]


def _form(grad: Tensor) -> _Form:
    return grad.dtype, grad.shape, grad.stride(), grad.device, grad.is_neg()


def _text(of: Tensor | _Form | None) -> str:
    if of is None:
        return "None"
    dtype, shape, strides, device, negated = _form(of) if isinstance(of, Tensor) else of
    return f"{dtype} {list(shape)} of strides {list(strides)} on {device}{', lazily negated' if negated else ''}"
