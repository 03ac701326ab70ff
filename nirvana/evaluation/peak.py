"""Peak of the memory that some code takes on top of what is there before it."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from pathlib import Path

import torch


class Peak:
    """``with Peak(device) as peak: ...`` and then ``peak.bytes``: what was there at once beyond what was there before;
    None where the system does not tell.

    On a CPU this is the resident set of the process: what is used again of memory that was freed and not given back
    counts for nothing, so `give_back` first where that matters.
    """

    bytes: int | None = None

    def __init__(self, device: str | torch.device, give_back: bool = False):
        self._device = device
        self._cuda = torch.device(device).type == "cuda"
        self._give_back = give_back

    def __enter__(self) -> Peak:
        if self._give_back:
            give_back()
        if self._cuda:
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        elif os.access("/proc/self/clear_refs", os.W_OK):
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
            self._before = _status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if self._cuda:
            torch.cuda.synchronize(self._device)
            self.bytes = torch.cuda.max_memory_allocated(self._device) - self._before
        elif hasattr(self, "_before"):
            self.bytes = max(0, _status("VmHWM") - self._before)


def give_back() -> None:
    """Free what nothing refers to, and let the C library hand its free memory back to the system (glibc only)."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0
