"""Progress in other steps than the work has."""

from __future__ import annotations

from collections.abc import Callable


def rescaled(progress: Callable[[], None], calls: int, steps: int) -> Callable[[], None]:
    """A function that, for each `calls` times it is called, calls `progress` `steps` times, evenly spread."""
    done = 0

    def advance() -> None:
        nonlocal done
        before, done = done, done + 1
        for _ in range(done * steps // calls - before * steps // calls):
            progress()

    return advance
