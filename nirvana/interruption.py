"""Ctrl-C that cannot get lost.

Python drops an exception that is raised inside a ``__del__`` or a callback of the garbage collector, KeyboardInterrupt
included: the program would go on as if nobody had pressed Ctrl-C. Seen in the ``__del__`` of a progress bar of tqdm.
And C code that asks a Python object something may take any exception for its answer: torch.tensor, interrupted while it
asks for an item, says ``ValueError: could not determine the shape of object type``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

#: After so many seconds a dropped interruption is sent again: `__del__` is over by then, or it is dropped once more.
AGAIN = 0.02


@contextlib.contextmanager
def interruptions_kept() -> Iterator[None]:
    """Inside, Ctrl-C and SIGTERM raise KeyboardInterrupt, which comes through whoever loses it.

    One that Python drops comes again a moment later, as a SIGTERM; one that was turned into another error takes that
    error's place. Where Ctrl-C is ignored (as by a shell's background jobs) or handled by somebody, it stays so.
    """
    before = sys.unraisablehook
    pending: list[threading.Timer] = []
    interrupted = False

    def interrupt(number: int, frame: object) -> NoReturn:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    def hook(dropped: UnraisableHookArgs) -> None:
        if not isinstance(dropped.exc_value, KeyboardInterrupt):
            before(dropped)
            return
        # Not SIGINT, which a shell lets background jobs ignore.
        timer = threading.Timer(AGAIN, os.kill, (os.getpid(), signal.SIGTERM))
        timer.daemon = True
        pending.append(timer)
        timer.start()

    # A polite kill unwinds like Ctrl-C, so that temporary folders go.
    handlers = {signal.SIGTERM: signal.signal(signal.SIGTERM, interrupt)}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        handlers[signal.SIGINT] = signal.signal(signal.SIGINT, interrupt)
    sys.unraisablehook = hook
    try:
        yield
    except Exception as error:
        if interrupted:
            raise KeyboardInterrupt from error
        raise
    finally:
        sys.unraisablehook = before
        for timer in pending:
            timer.cancel()
        for number, handler in handlers.items():
            signal.signal(number, handler)
