"""Peak of the memory that some code takes on top of what is there before it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Peak:
    """``with Peak(device) as peak: ...`` and then ``peak.bytes``: what was there at once beyond what was there before;
    None where the system does not tell.

    On a CPU this is the resident set of the process.
    """

    bytes: int | None = None

    def __init__(self, device: str):
        self._device = device
        self._cuda = torch.device(device).type == "cuda"

    def __enter__(self) -> Peak:
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


def additional_bytes(call: Callable[[], Any], device: str) -> int | None:
    """Peak of a call, its result included. It is called once before: what libraries load and compile then is not the
    job's."""
    call()
    with Peak(device) as peak:
        call()
    return peak.bytes


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0
