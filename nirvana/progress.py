"""How long-running functions tell how far they are. The library stays silent; the command line draws bars."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


class Progress:
    """Silent. A subclass draws."""

    @contextlib.contextmanager
    def stage(self, name: str, total: int, unit: str = "") -> Iterator[Callable[[int], None]]:
        """Inside, calling the yielded function with a number reports that many more of `total` done."""
        yield lambda count: None

    def note(self, line: str) -> None:
        """Something that the user should know before the work goes on."""
