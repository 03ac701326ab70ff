"""Time of the stages of something that runs once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch


class Stopwatch:
    """Seconds by stage; a stage that comes again adds up. On a GPU the device's own time between events, read at the
    end, so that measuring makes nothing wait."""

    def __init__(self, device: str):
        self._cuda = torch.device(device).type == "cuda"
        self._spans: dict[str, list[tuple[Any, Any]]] = {}

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = self._now()
        yield
        self._spans.setdefault(stage, []).append((start, self._now()))

    def around(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, whose calls are a stage."""

        def call(*args: Any, **options: Any) -> Any:
            with self(stage):
                return function(*args, **options)

        return call

    def seconds(self) -> dict[str, float]:
        if self._cuda:
            torch.cuda.synchronize()
            return {k: sum(a.elapsed_time(b) for a, b in spans) / 1e3 for k, spans in self._spans.items()}
        return {k: sum(b - a for a, b in spans) for k, spans in self._spans.items()}

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
