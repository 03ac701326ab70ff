"""Ctrl-C that cannot get lost.

Python drops an exception that is raised inside a ``__del__`` or a callback of the garbage collector, KeyboardInterrupt
included: the program would go on as if nobody had pressed Ctrl-C. Seen in the ``__del__`` of a progress bar of tqdm.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

#: After so many seconds a dropped interruption is sent again: `__del__` is over by then, or it is dropped once more.
AGAIN = 0.02


@contextlib.contextmanager
def interruptions_kept() -> Iterator[None]:
    """Inside, a KeyboardInterrupt that Python drops comes again a moment later, as the SIGTERM that raises it."""
    before = sys.unraisablehook
    pending: list[threading.Timer] = []

    def hook(dropped: UnraisableHookArgs) -> None:
        if not isinstance(dropped.exc_value, KeyboardInterrupt):
            before(dropped)
            return
        # Not SIGINT, which a shell lets background jobs ignore; the command line takes SIGTERM as the same.
        timer = threading.Timer(AGAIN, os.kill, (os.getpid(), signal.SIGTERM))
        timer.daemon = True
        pending.append(timer)
        timer.start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before
        for timer in pending:
            timer.cancel()
