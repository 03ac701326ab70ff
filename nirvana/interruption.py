"""Ctrl-C and SIGTERM that cannot get lost, and that do not come in the middle of what must not be torn apart.

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
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sys import UnraisableHookArgs

SIGNALS = (signal.SIGINT, signal.SIGTERM)

#: After so many seconds a dropped interruption is sent again: `__del__` is over by then, or it is dropped once more.
AGAIN = 0.02


class Interruptions:
    """What `interruptions_kept` knows.

    Attributes:
        came: there was one.
        over: set by whoever has nothing left to be interrupted; from then on signals do nothing.
    """

    def __init__(self) -> None:
        self.came = self.over = False

    def interrupt(self, number: int, frame: object) -> None:
        if not self.over:
            self.came = True
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def surfacing(self) -> Iterator[None]:
        """An interruption that was turned into another error inside takes that error's place."""
        try:
            yield
        except Exception as error:
            if self.came:
                raise KeyboardInterrupt from error
            raise


@contextlib.contextmanager
def interruptions_kept() -> Iterator[Interruptions]:
    """Inside, Ctrl-C and SIGTERM raise KeyboardInterrupt, and one that Python drops comes again a moment later.

    It comes again as a SIGTERM. Where Ctrl-C is ignored (as by a shell's background jobs) or handled by somebody, it
    stays so.
    """
    before = sys.unraisablehook
    pending: list[threading.Timer] = []
    interruptions = Interruptions()

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
    handlers = {signal.SIGTERM: signal.signal(signal.SIGTERM, interruptions.interrupt)}
    if signal.getsignal(signal.SIGINT) in (signal.default_int_handler, signal.SIG_DFL):
        handlers[signal.SIGINT] = signal.signal(signal.SIGINT, interruptions.interrupt)
    sys.unraisablehook = hook
    try:
        yield interruptions
    finally:
        sys.unraisablehook = before
        for timer in pending:
            timer.cancel()
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def interruptions_held() -> Iterator[None]:
    """Inside, Ctrl-C and SIGTERM wait, whoever handles them; they come when the body has ended.

    For a few renames and removals that belong together, with or without `interruptions_kept`. Python runs handlers in
    the main thread only, so in other threads there is nothing to hold.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    found = {number: signal.getsignal(number) for number in SIGNALS}
    # None is a handler that Python did not install and could not put back.
    handlers = {number: handler for number, handler in found.items() if handler not in (None, signal.SIG_IGN)}
    waiting: list[int] = []
    holding = True

    def hold(number: int, frame: object) -> None:
        if holding:
            waiting.append(number)
        else:
            # One came before all handlers were back.
            signal.signal(number, handlers[number])
            signal.raise_signal(number)

    try:
        for number in handlers:
            signal.signal(number, hold)
        yield
    finally:
        holding = False
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in waiting:
            signal.raise_signal(number)
