"""Stages in processes of their own, each with a limit of time, all of them within one.

A stage is a command. It is started before its turn, so that its imports (5 s) cost nobody's time; its turn comes with
a line of JSON on its standard input, its task. It writes what it has so far to ``task["file"]``, as `save` does, the
last time with an outcome. A stage that crashes, hangs or says nothing is reported with what it had, and the others go
on.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Characters of what a stage printed that are kept.
LOG = 20_000
#: Seconds that a stage gets to say where it hangs.
LAST_WORDS = 1
#: Seconds that a killed process gets to vanish. One that waits for a broken driver may never do.
VANISHING = 5
#: A stage may take as many times its limit where earlier ones have left it: one that hangs is not to use all of that
#: up. The last ones may.
MOST = 2
#: Seconds between two looks at the processes.
POLL = 0.05
#: Seconds of a stage's limit after which it is to start nothing new.
RESERVE = 4
#: How an outcome begins where there is no such device: no other stage has one either.
UNUSABLE = "unusable: "


@dataclass(frozen=True)
class Step:
    """A stage in its place.

    Attributes:
        name: in the results.
        seconds: its limit, which adds up with those of the others. What earlier ones leave of theirs is added, as far
            as `MOST` allows.
        command: of its process.
        task: what its process is told besides the file and the limit.
    """

    name: str
    seconds: float
    command: Sequence[str]
    task: dict[str, Any]


@dataclass(frozen=True)
class Result:
    """What a stage came to.

    Attributes:
        outcome: "passed", "passed, ...", "skipped: ...", "failed: ..." or "unusable: ...".
        seconds: from its turn to its end.
        document: what it wrote last, if anything.
        log: the end of what it printed.
    """

    name: str
    outcome: str
    seconds: float
    document: dict[str, Any] | None
    log: str

    @property
    def failed(self) -> bool:
        return self.outcome.startswith(("failed", UNUSABLE))


def save(file: str | Path, document: dict[str, Any] | None, outcome: str | None = None) -> None:
    """What a stage has so far. Its process may be killed at any time."""
    replace(file, json.dumps({"outcome": outcome, "document": document}))


def replace(file: str | Path, text: str) -> None:
    """Whole or not at all, and no wait for the disk: stages write while others are timed.

    Raises:
        OSError: the disk refuses.
    """
    partial = Path(f"{file}.part")
    partial.write_text(text)
    os.replace(partial, file)


def run(
    groups: Sequence[Sequence[Step]], deadline: float, workers: int, report: Callable[[Result], None]
) -> list[Result]:
    """Run groups one after another, the steps of a group side by side, `workers` at a time.

    Args:
        deadline: of `time.monotonic`, when everything has ended.
        report: called with each result as it comes.
    """
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        ready: dict[int, list[_Process]] = {}

        def prepare(place: int) -> None:
            if place < len(groups):
                ready[place] = [stack.enter_context(_Process(step, Path(folder))) for step in groups[place]]

        prepare(0)
        for place in range(len(groups)):
            prepare(place + 1)
            later = sum(max(step.seconds for step in others) for others in groups[place + 1 :])
            most = MOST if place < len(groups) - 1 else math.inf
            for result in _side_by_side(ready.pop(place), deadline - later, workers, most):
                results.append(result)
                report(result)
    return results


def _side_by_side(waiting: list[_Process], end: float, workers: int, most: float) -> Iterator[Result]:
    running: list[_Process] = []
    while waiting or running:
        while waiting and len(running) < workers:
            # Where they cannot all run at once, each gets its share of the time.
            share = (end - time.monotonic()) / math.ceil(len(waiting) / workers)
            running.append(waiting.pop(0))
            running[-1].start(min(share, most * running[-1].step.seconds))
        for process in [process for process in running if process.over]:
            running.remove(process)
            yield process.result()
        time.sleep(POLL)


class _Process:
    """The process of one step, at first waiting for its turn. As a context manager it has ended afterwards."""

    def __init__(self, step: Step, folder: Path):
        self.step = step
        stem = step.name.replace(" ", "-")
        self._file, self._log = folder / f"{stem}.json", folder / f"{stem}.log"
        with open(self._log, "wb") as log:
            # A session of its own, so that what the stage has started ends with it.
            self._process = subprocess.Popen(
                step.command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._killed = False

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()

    def start(self, seconds: float) -> None:
        """Give it its turn, and these seconds."""
        self._started, self._seconds = time.monotonic(), seconds
        if seconds <= RESERVE:
            return
        # The clock is the system's, and the same in all processes.
        task = {**self.step.task, "file": str(self._file), "until": self._started + seconds - RESERVE}
        # A process that has ended before its turn is found by `over`.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(task).encode() + b"\n")
            self._process.stdin.flush()

    @property
    def over(self) -> bool:
        late = time.monotonic() - self._started > self._seconds or self._seconds <= RESERVE
        return late or self._process.poll() is not None

    def result(self) -> Result:
        if self._seconds <= RESERVE:
            return Result(self.step.name, "failed: no time left", 0.0, None, "")
        code = self._process.poll()
        if code is None:
            # Under `python -X faulthandler` it prints where it hangs.
            self._process.send_signal(signal.SIGABRT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(LAST_WORDS)
        self._kill()
        seconds = time.monotonic() - self._started
        ending = ""
        if code is None:
            ending = f"killed after {self._seconds:.0f} s"
        elif code:
            ending = f"exit code {code}" if code > 0 else signal.Signals(-code).name
        said = json.loads(self._file.read_text()) if self._file.is_file() else {"outcome": None, "document": None}
        outcome = said["outcome"]
        if outcome is None:
            outcome = f"failed: {ending or 'ended'} {'before its end' if said['document'] else 'without a result'}"
        elif code is None:
            outcome += f"; {ending}, after its end"
        elif code:
            outcome = f"failed: {ending}, after it had {outcome}"
        return Result(self.step.name, outcome, seconds, said["document"], self._log.read_text(errors="replace")[-LOG:])

    def _kill(self) -> None:
        """End it and all that it has started."""
        if self._killed:
            return
        self._killed = True
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(VANISHING)
        with contextlib.suppress(BrokenPipeError):  # closing flushes
            self._process.stdin.close()


def take_turn() -> dict[str, Any]:
    """In a stage's process: wait for its task. The process ends, with all that it has started, when the one that it
    works for does."""
    line = sys.stdin.readline()
    if not line:
        raise SystemExit(0)
    # One that crashes is not to leave its memory as a file in the repository.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def follow() -> None:
        os.read(0, 1)  # returns at the end of the pipe
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=follow, daemon=True).start()
    return json.loads(line)
