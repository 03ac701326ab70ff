"""Tables of many tensors for one launch: addresses and sizes as int64 columns in device memory."""

# ruff: noqa: N803 - compile-time arguments are upper case, as everywhere in Triton

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from nirvana.ops.backends.upload import upload

#: Entries that `locate` compares at a time.
SEARCH = 256


@triton.jit
def locate(first_ptr, entries, program, SEARCH: tl.constexpr):
    """Index of the entry that `program` works for: the last one whose first program is not above it.

    One vector compare a `SEARCH` entries: a binary search would wait for memory once a level.
    """
    lanes = tl.arange(0, SEARCH)
    below = tl.zeros([SEARCH], tl.int32)
    for start in range(0, entries, SEARCH):
        index = start + lanes
        first = tl.load(first_ptr + index, mask=index < entries, other=2**62)
        below += (first <= program).to(tl.int32)
    return tl.sum(below) - 1


class Table:
    """Collects blocks of rows on the host, then copies them to the device at once."""

    def __init__(self) -> None:
        self._values: list[int] = []

    def add(self, rows: Sequence[Sequence[int]]) -> int:
        """Append a block of equally long rows, column after column; returns where it starts, in elements."""
        start = len(self._values)
        for column in zip(*rows, strict=True):
            self._values.extend(column)
        return start

    def to(self, device: torch.device) -> Tensor:
        """int64 vector on `device`; refused while a CUDA graph is captured (`nirvana.ops.backends.upload`)."""
        return upload(self._values, device)


def on(device: torch.device) -> AbstractContextManager:
    """Makes `device` current, where launches go; nothing for CPU tensors, which the interpreter serves."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
