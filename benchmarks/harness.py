"""Several ways of doing one job: each one checked first, then timed in turns with the others.

A job is one function of one set of inputs. Its ways are the published eager code, torch.compile, the backends of
nirvana; its ceilings are reads or copies of the same bytes, which no way can beat. A result that is wrong stops the
benchmark before anything is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nirvana.benchmarks import environment, report
from nirvana.errors import NirvanaError
from nirvana.ops import use_backend
from nirvana.ops.backends import BACKENDS

#: Untimed calls of each way, the checked one included: compilation, allocator, page tables of the inputs.
WARM_UP = 2
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class WrongResultError(Exception):
    """A way does not compute what it is timed for."""


class NoDeviceError(NirvanaError):
    """There is no such device."""


class SkipError(Exception):
    """Something that cannot run here, and why; nothing is wrong."""


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        device: "cpu", "cuda" or "cuda:1".
        rounds: timed calls of each way.
        quick: small shapes, to see that everything runs; the figures mean nothing.
        seconds: start no further job after this long; None is no limit.
        compile: whether torch.compile is timed as well; it takes seconds a shape.
        strict: whether a wrong way stops its job; else it is named under ``failed``, and the others are timed.
    """

    device: str = "cpu"
    rounds: int = 20
    quick: bool = False
    seconds: float | None = None
    started: float = field(default_factory=time.monotonic)
    compile: bool = True
    strict: bool = True

    @property
    def left(self) -> float:
        """Seconds until nothing further is to be started; infinite without a limit."""
        return math.inf if self.seconds is None else self.started + self.seconds - time.monotonic()

    @property
    def late(self) -> bool:
        return self.left < 0


@dataclass(frozen=True)
class Way:
    """One way of doing a job.

    Attributes:
        name: in tables and files.
        call: called with one set of inputs; returns what `Job.check` looks at.
        limit: name of the ceiling that bounds it; None where no ceiling does.
        backend: of nirvana, forced around the call and outside of its time.
        optional: whether it may be missing here; the reason is then reported instead of a time.
        tolerance: what `Job.check` allows it.
    """

    name: str
    call: Callable[..., Any]
    limit: str | None = None
    backend: str | None = None
    optional: bool = False
    tolerance: float = 0.0


@dataclass(frozen=True)
class Job:
    """What the ways have in common.

    Attributes:
        name: shape, type and axis.
        moved: bytes that must be read and written; GB/s are counted from these for all ways and ceilings.
        ways: of equal meaning.
        ceilings: name -> several honest ways to move the same bytes; the fastest counts.
        copies: sets of inputs, taken in turn.
        check: called with (way, its result, inputs); raises WrongResultError.
        eager, compiled: names of the ways that the columns of ratios refer to.
    """

    name: str
    moved: int
    ways: Sequence[Way]
    ceilings: dict[str, Sequence[Way]]
    copies: Sequence[tuple]
    check: Callable[[Way, Any, tuple], None]
    eager: str = "eager"
    compiled: str = "torch.compile"


def measure(job: Job, settings: Settings) -> dict[str, Any]:
    """Check every way, then time all of them in rounds, so that a change of the clock hits all alike.

    Raises:
        WrongResultError: a way is wrong; nothing has been timed.
    """
    skipped: dict[str, str] = {}
    failed: dict[str, str] = {}
    ready: list[Way] = []
    for way in job.ways:
        if way.name == job.compiled and not settings.compile:
            continue
        try:
            with forced(way.backend):
                result = way.call(*job.copies[0])
            job.check(way, result, job.copies[0])
        except Exception as error:
            missing = way.optional and not isinstance(error, WrongResultError)
            if settings.strict and not missing:
                raise
            (skipped if missing else failed)[way.name] = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            continue
        del result
        ready.append(way)
    timed = [*ready, *(way for ways in job.ceilings.values() for way in ways)]
    clock = Clock(settings.device)
    samples: dict[Way, list[float]] = {way: [] for way in timed}
    for turn in range(WARM_UP - 1 + settings.rounds):
        for way in timed:
            with forced(way.backend):
                seconds = clock.seconds(way.call, job.copies[turn % len(job.copies)])
            if turn >= WARM_UP - 1:
                samples[way].append(seconds)
    figures = {way: _figures(samples[way], job.moved) for way in timed}
    ceilings = {}
    for limit, ways in job.ceilings.items():
        best = min(ways, key=lambda way: figures[way]["p50_ms"])
        ceilings[limit] = {"way": best.name, **figures[best]}
    named = {way.name: figures[way] for way in ready}
    for way in ready:
        mine = named[way.name]
        mine["limit"] = way.limit
        mine["of_limit"] = ceilings[way.limit]["p50_ms"] / mine["p50_ms"] if way.limit else None
        for key, other in (("times_eager", job.eager), ("times_compile", job.compiled)):
            mine[key] = named[other]["p50_ms"] / mine["p50_ms"] if other in named else None
    return {
        "job": job.name,
        "bytes": job.moved,
        "ways": named,
        "ceilings": ceilings,
        "skipped": skipped,
        "failed": failed,
    }


def _figures(samples: list[float], moved: int) -> dict[str, Any]:
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    p20, p50, p80 = cuts[1], cuts[4], cuts[7]
    return {"p20_ms": p20 * 1e3, "p50_ms": p50 * 1e3, "p80_ms": p80 * 1e3, "gb_per_s": moved / p50 / 1e9}


class Clock:
    """Time of one call. On a GPU it is the device's own, between events on the stream."""

    #: Bytes; more than four times the L2 of any GPU so far.
    FLUSH = 2**29
    #: Reading these takes longer (125 to 180 us each at 3 to 4.3 TB/s) than Python needs to launch a kernel (up to 75
    #: us for `group_saliency`), so that the time between the events is the device's and not the interpreter's.
    FLUSHES = 4

    def __init__(self, device: str):
        self._flush = None
        if torch.device(device).type == "cuda":
            self._flush = torch.zeros(self.FLUSH // 4, device=device)
            self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(self, call: Callable[..., Any], inputs: tuple) -> float:
        if self._flush is None:
            start = time.perf_counter()
            call(*inputs)
            return time.perf_counter() - start
        # Read, not written: dirty lines would have to go to memory within the measured time.
        for _ in range(self.FLUSHES):
            self._flush.sum()
        self._start.record()
        result = call(*inputs)
        self._end.record()
        self._end.synchronize()
        del result
        return self._start.elapsed_time(self._end) / 1e3


def forced(backend: str | None) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if backend is None else use_backend(backend)


def backends(device: str) -> list[str]:
    """The backends that serve tensors on `device` here. Interpreted Triton is for tests and no way to measure."""
    kind = torch.device(device).type
    return [
        name
        for name, backend in BACKENDS.items()
        if (not backend.devices or kind in backend.devices) and backend.why_not() is None
    ]


def copies(make: Callable[[int], tuple], moved: int, settings: Settings) -> list[tuple]:
    """Sets of inputs made by ``make(seed)``, enough of them to exceed four last-level caches when taken in turn.

    On a GPU one set will do: `Clock` reads through L2 before each call.
    """
    count = 1
    if torch.device(settings.device).type == "cpu" and not settings.quick:
        count = min(64, max(1, math.ceil(4 * environment.last_level_cache() / moved)))
    return [make(seed) for seed in range(count)]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for exactly these shapes, at the first call. Earlier compilations are forgotten: beyond 8 of one
    function it gives up and runs eagerly."""
    made: list[Callable[..., Any]] = []

    def call(*args: Any) -> Any:
        if not made:
            torch.compiler.reset()
            made.append(torch.compile(function, dynamic=False))
        return made[0](*args)

    return call


def assert_close(way: Way, result: Tensor, exact: Tensor) -> None:
    """Raise WrongResultError unless `result` lies within ``way.tolerance`` of `exact`, relative to each element."""
    if result.shape != exact.shape:
        raise WrongResultError(f"{way.name} gives {list(result.shape)}, not {list(exact.shape)}")
    error = relative_error(result, exact)
    if not error <= way.tolerance:
        raise WrongResultError(
            f"{way.name} is wrong: relative error {error:.2g} against float64, {way.tolerance:.2g} allowed"
        )


def assert_equal(way: Way, result: Tensor, exact: Tensor) -> None:
    """Raise WrongResultError unless the bits are equal."""
    if result.shape != exact.shape or not torch.equal(_bits(result), _bits(exact)):
        raise WrongResultError(f"{way.name} is wrong: its bits are not those of the kept units")


def same_bits(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Whether two sets of scores are equal to the last bit, and none is NaN."""
    return all(torch.equal(values, second[block]) for block, values in first.items())


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def relative_error(result: Tensor, exact: Tensor) -> float:
    return float(((result.double() - exact).abs() / exact.abs().clamp_min(1e-300)).max())


#: Of our kernels' sums, against float64. Their summation trees do not let errors grow with the length.
PRECISE = 4e-6


def tolerance(dtype: torch.dtype, terms: int) -> float:
    """Of sums of `terms` terms in `dtype` as PyTorch makes them: some of its kernels add one term after another, whose
    errors grow like a random walk."""
    return max(2 * torch.finfo(dtype).eps, terms**0.5 * torch.finfo(torch.float32).eps, PRECISE)


def find_device(name: str) -> str:
    """ "auto" is the GPU where there is one. A GPU is made the current one: events are recorded on its stream.

    Raises:
        NoDeviceError: there is no such device.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind, index = torch.device(name).type, torch.device(name).index
    except RuntimeError:
        kind, index = "", None
    if kind not in ("cpu", "cuda"):
        raise NoDeviceError(f"--device {name!r}: benchmarks run on cpu, cuda, cuda:1, ...")
    if kind == "cuda" and (index or 0) >= torch.cuda.device_count():
        raise NoDeviceError(f"--device {name!r}: torch sees {torch.cuda.device_count()} CUDA devices here")
    if kind == "cuda":
        torch.cuda.set_device(index or 0)
    return name


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options of every benchmark that is run as a module."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda, cuda:1, ...")
    result.add_argument("--rounds", type=int, default=20, metavar="N", help="timed calls of each way (default: 20)")
    result.add_argument("--quick", action="store_true", help="small shapes: does it run?")
    result.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    result.add_argument("--seconds", type=float, metavar="S", help="start no further job after this long")
    result.add_argument("--json", metavar="FILE", help="also write the result there")
    return result


def settings(args: argparse.Namespace) -> Settings:
    if args.threads:
        torch.set_num_threads(args.threads)
    return Settings(find_device(args.device), max(args.rounds, 2), args.quick, args.seconds)


def dtype_names(text: str) -> list[str]:
    """Names of types, separated by commas.

    Raises:
        NirvanaError: there is no such type.
    """
    names = text.split(",")
    for name in names:
        if name not in DTYPES:
            raise NirvanaError(f"--dtype {name!r} must be one of {', '.join(DTYPES)}")
    return names


def document(name: str, settings: Settings, jobs: list[dict[str, Any]], **records: list[dict[str, Any]]) -> dict:
    """The result of a benchmark: `jobs` as `measure` gives them, and tables of other figures by title."""
    return {
        "benchmark": name,
        "environment": environment.describe(settings.device),
        "settings": {"rounds": settings.rounds, "quick": settings.quick, "complete": not settings.late},
        "jobs": jobs,
        "records": records,
    }


def finish(result: dict[str, Any], file: str | None) -> None:
    """Print a document, and write it where asked."""
    report.show(result)
    if file:
        report.write(result, file)
