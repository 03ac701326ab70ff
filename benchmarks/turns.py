"""A runtime in a process of its own that measures when it is its turn.

`Measurement` does the work; `Elsewhere` is the same object in another process, which answers each line of its standard
input with a line of JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import nirvana
from nirvana.benchmarks.engines import ENGINES, divergence
from nirvana.benchmarks.harness import WrongResultError

#: Greedy tokens that are checked before anything is timed.
CHECKED = 4


class FailedError(Exception):
    """A process has ended before its time; the message ends with what it said last."""


@dataclass(frozen=True)
class Job:
    """What one process measures.

    Attributes:
        engine: name in `engines.ENGINES`.
        checkpoint, exported: what the engine opens.
        prompt: token ids.
        steps: tokens to decode after it.
    """

    engine: str
    checkpoint: str
    exported: str | None
    prompt: list[int]
    steps: int


class Measurement:
    """A runtime that has been opened, and found right."""

    def __init__(self, job: Job):
        engine = ENGINES[job.engine]
        self._job = job
        self._runtime = engine.open(job.checkpoint, job.exported)
        self.divergence = divergence(self._runtime, job.checkpoint, job.prompt, CHECKED)
        if not self.divergence <= engine.limit:
            raise WrongResultError(
                f"{job.engine} is wrong: {self.divergence:.2g} nats from transformers, {engine.limit:.2g} allowed"
            )

    def seconds(self) -> tuple[float, float]:
        """CPU seconds of this process, all its threads together, for the prompt and for the tokens after it."""
        start = time.process_time()
        self._runtime.prefill(self._job.prompt)
        middle = time.process_time()
        self._runtime.decode(self._job.steps)
        return middle - start, time.process_time() - middle

    def close(self) -> None:
        del self._runtime


class Elsewhere:
    """A `Measurement` in a process of its own; opening goes on while the caller does something else."""

    def __init__(self, job: Job, python: str = sys.executable):
        self._name = job.engine
        self._notes = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process; see close)
        root = Path(nirvana.__file__).parents[1]  # another Python may not have nirvana installed
        paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [python, "-m", "nirvana.benchmarks.turns"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._notes,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        )
        self._tell(asdict(job))

    def wait(self) -> None:
        """Until it is open and checked."""
        self.divergence = self._hear()

    def seconds(self) -> tuple[float, float]:
        self._tell("go")
        prefill, decode = self._hear()
        return prefill, decode

    def close(self) -> None:
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._notes.close()

    def _tell(self, what: object) -> None:
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()

    def _hear(self) -> object:
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._notes.seek(0)
            raise FailedError(f"{self._name} failed: {self._notes.read()[-2000:].strip()}")
        return json.loads(line)


def main() -> None:
    # Libraries may write to stdout, C++ ones too: what is ours goes through a descriptor of its own.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(1)
    measurement = Measurement(Job(**json.loads(sys.stdin.readline())))
    print(json.dumps(measurement.divergence), file=answers)
    for _ in sys.stdin:
        print(json.dumps(measurement.seconds()), file=answers)
    # Engines with threads of their own need not be taken apart in order.
    os._exit(0)


if __name__ == "__main__":
    main()
