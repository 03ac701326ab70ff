"""Peak of the memory that a call takes on top of what is there before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nirvana.evaluation.peak import Peak

__all__ = ["Peak", "additional_bytes"]


def additional_bytes(call: Callable[[], Any], device: str) -> int | None:
    """Peak of a call, its result included. It is called once before: what libraries load and compile then is not the
    job's."""
    call()
    with Peak(device) as peak:
        call()
    return peak.bytes
