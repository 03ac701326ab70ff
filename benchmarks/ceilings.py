"""Limits that no kernel can beat: reading, and copying, the same bytes on the same device.

There is no one way that is fastest on every machine, so several honest ones are timed and the fastest counts.
"""

from __future__ import annotations

import importlib
import mmap
from types import ModuleType

import torch
from torch import Tensor

from nirvana.benchmarks.harness import Way


def reads(tensors: int, device: str) -> list[Way]:
    """Ways to read the first `tensors` inputs once; neighbours are of equal size. Bytes: theirs, none written."""
    ways = [Way("torch.sum of fp32 words", lambda *inputs: [_words(x).sum() for x in inputs[:tensors]])]
    native = _native(device)
    if native is not None:
        threads = torch.get_num_threads()

        def read(*inputs: Tensor) -> list[int]:
            pairs = zip(inputs[:tensors:2], inputs[1:tensors:2], strict=True)
            return [native.read_bytes(a.data_ptr(), b.data_ptr(), a.nbytes, threads) for a, b in pairs]

        ways.append(Way("C++ loop", read))
    return ways


def copies_to_new_memory(size: int, device: str) -> list[Way]:
    """Ways to copy the first `size` bytes of the first input into memory that is allocated for it. On a CPU that costs
    more than the copy: the system makes, and clears, every page, less so for huge pages. Bytes: `size` read + written.
    """
    ways = [Way("torch.clone", lambda first, *_: _bytes(first)[:size].clone())]
    native = _native(device)
    if native is not None:
        threads = torch.get_num_threads()

        def copy(first: Tensor, *_: object) -> Tensor:
            out = torch.empty(size, dtype=torch.uint8)
            native.copy_bytes(first.data_ptr(), out.data_ptr(), size, threads)
            return out

        ways.append(Way("C++ copy", copy))
    if torch.device(device).type == "cpu" and hasattr(mmap, "MADV_HUGEPAGE"):

        def huge(first: Tensor, *_: object) -> Tensor:
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(mmap.MADV_HUGEPAGE)
            return torch.frombuffer(memory, dtype=torch.uint8).copy_(_bytes(first)[:size])

        ways.append(Way("torch copy_ to huge pages", huge))
    return ways


def copies_to_existing_memory(size: int, device: str) -> list[Way]:
    """The same into a buffer that is there already. Bytes: `size` read + `size` written."""
    out = torch.zeros(size, dtype=torch.uint8, device=device)
    ways = [Way("torch copy_", lambda first, *_: out.copy_(_bytes(first)[:size]))]
    native = _native(device)
    if native is not None:
        threads = torch.get_num_threads()
        ways.append(
            Way("C++ copy", lambda first, *_: native.copy_bytes(first.data_ptr(), out.data_ptr(), size, threads))
        )
    return ways


def _native(device: str) -> ModuleType | None:
    if torch.device(device).type != "cpu":
        return None
    try:
        return importlib.import_module("nirvana._cpu")
    except ImportError:
        return None


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


def _words(tensor: Tensor) -> Tensor:
    """The bytes as fp32: pairs of 16-bit numbers make meaningless values, but adding those takes no longer."""
    flat = tensor.view(-1)
    size = 4 // flat.element_size()
    return flat[: flat.numel() // size * size].view(torch.float32)
