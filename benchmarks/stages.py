"""What `gpu` runs, by name; and the process that one stage runs in (see `runner`).

A stage gives its document each time that it has grown, so that a stage that is killed leaves what it had. One job that
fails does not take the others of its stage with it.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from nirvana.benchmarks import (
    ceilings,
    correctness,
    environment,
    harness,
    inference,
    kl,
    mixture,
    profiled,
    real,
    report,
    runner,
    saliency,
    scoring,
    slice,
    tools,
    walks,
)
from nirvana.benchmarks.harness import Job, Settings, SkipError
from nirvana.benchmarks.shapes import MODELS, QUICK
from nirvana.errors import NirvanaError
from nirvana.ops.backends import BACKENDS

Document = dict[str, Any]

#: Logits of two models, in the order of what matters most.
KL_SHAPES = ((512, 128256), (4096, 128256), (128, 128256), (512, 49152))


def describe(settings: Settings) -> Iterator[Document]:
    about = environment.describe(settings.device)
    # Those of this moment: the native modules may be built later.
    backends = [{"backend": name, "status": status} for name, status in about["backends"].items()]
    document = harness.document("environment", settings, [], backends_at_the_start=backends)
    yield document | {"headlines": [report.machine(about)]}


def matrices(settings: Settings) -> Iterator[Document]:
    """group_saliency of the matrices of an 8B model."""
    yield from _grow("saliency", settings, _saliency_jobs(settings, "gate", "down", "q", "o", "k"))


def against_compile(settings: Settings) -> Iterator[Document]:
    """The largest two once more, beside torch.compile, which takes seconds to compile each."""
    settings = replace(settings, compile=True)
    yield from _grow("torch.compile", settings, _saliency_jobs(settings, "gate", "down"))


def _saliency_jobs(settings: Settings, *names: str) -> list[Callable[[], Job]]:
    model = MODELS[QUICK if settings.quick else "Llama-3.1-8B"]
    found = {matrix.name.strip(): matrix for matrix in model.layer_matrices()}
    return [partial(saliency.job, found[name], torch.bfloat16, settings) for name in names]


def grouped(settings: Settings) -> Iterator[Document]:
    """All matrices of a small model in one call."""
    name = QUICK if settings.quick else "SmolLM2-135M"
    dtypes = (torch.bfloat16,) if settings.quick else (torch.bfloat16, torch.float32)
    yield from _grow("grouped", settings, [partial(saliency.grouped_job, name, dtype, settings) for dtype in dtypes])


def gathers(settings: Settings) -> Iterator[Document]:
    sizes = [(64, 96, 1), (96, 64, 0)] if settings.quick else slice.SHAPES
    jobs = [partial(slice.job, *size, fraction, torch.bfloat16, settings) for fraction in slice.KEPT for size in sizes]
    yield from _grow("slice", settings, jobs)


def divergence(settings: Settings) -> Iterator[Document]:
    sizes: Sequence[tuple[int, int]] = kl.QUICK_SHAPES if settings.quick else KL_SHAPES
    jobs = [partial(kl.job, *size, torch.bfloat16, settings) for size in sizes]
    jobs.append(partial(kl.job, *sizes[-1], torch.float32, settings))
    heads = kl.QUICK_LINEAR_SHAPE if settings.quick else kl.LINEAR_SHAPE
    jobs.append(partial(kl.heads_job, *heads, torch.bfloat16, settings))
    yield from _grow("kl", settings, jobs)


def _grow(name: str, settings: Settings, jobs: Sequence[Callable[[], Job]]) -> Iterator[Document]:
    done: list[dict[str, Any]] = []
    failures: list[str] = []
    note = None
    for place, job in enumerate(jobs):
        if settings.late:
            note = f"{place} of {len(jobs)} jobs in its time"
            break
        try:
            done.append(harness.measure(job(), settings))
            failures += [f"{done[-1]['job']}: {way}: {reason}" for way, reason in done[-1]["failed"].items()]
        except Exception as error:
            traceback.print_exc()
            failures.append(f"{type(error).__name__}: {error}")
        yield harness.document(name, settings, done) | {"failures": failures}
    if note:
        yield harness.document(name, settings, done) | {"failures": failures, "note": note}


def _correct(backend: str) -> Callable[[Settings], Iterator[Document]]:
    """In a process of its own: where one has broken its CUDA context, the verdict on the others is to be theirs."""

    def stage(settings: Settings) -> Iterator[Document]:
        if backend not in harness.backends(settings.device):
            raise SkipError(BACKENDS[backend].why_not() or f"it does not serve {settings.device}")
        yield correctness.run(settings, [backend])

    return stage


def _once(run: Callable[[Settings], Document]) -> Callable[[Settings], Iterator[Document]]:
    def stage(settings: Settings) -> Iterator[Document]:
        yield run(settings)

    return stage


STAGES: dict[str, Callable[[Settings], Iterator[Document]]] = {
    "environment": describe,
    "build": tools.build,
    "triton warm-up": tools.warm_up,
    **{f"correctness {backend}": _correct(backend) for backend in BACKENDS},
    "walks": _once(walks.run),
    "tests": tools.tests,
    "memcheck": tools.memcheck,
    "racecheck": tools.racecheck,
    "ceilings": _once(ceilings.run),
    "saliency": matrices,
    "torch.compile": against_compile,
    "slice": gathers,
    "kl": divergence,
    "scoring": scoring.grow,
    "grouped": grouped,
    "ncu": profiled.profile,
    "mixture": mixture.grow,
    "real model": real.grow,
    "inference": inference.grow,
}


def perform(name: str, settings: Settings, file: str) -> str:
    """Run a stage in this process; what it has goes to `file` as it comes.

    Returns:
        "passed", "passed, ...", "skipped: ...", "failed: ..." or "unusable: ...".
    """
    document = None
    try:
        harness.find_device(settings.device)
        for document in STAGES[name](settings):
            runner.save(file, document)
        outcome = _judge(document)
    except SkipError as reason:
        outcome = f"skipped: {_line(reason)}"
    except harness.NoDeviceError as error:
        outcome = f"{runner.UNUSABLE}{_line(error)}"
    except NirvanaError as error:
        outcome = f"failed: {_line(error)}"
    except Exception as error:
        traceback.print_exc()
        outcome = f"failed: {type(error).__name__}: {_line(error)}"
    if document is not None:
        report.show(document)
    runner.save(file, document, outcome)
    return outcome


def _judge(document: Document | None) -> str:
    if document is None:
        return "failed: no time for anything"
    if document.get("failures"):
        return f"failed: {_line('; '.join(document['failures']))}"
    return f"passed, {document['note']}" if document.get("note") else "passed"


def _line(text: object) -> str:
    return " ".join(str(text).split())[:300]


def main() -> None:
    task = runner.take_turn()
    seconds = task["until"] - time.monotonic()
    settings = Settings(task["device"], task["rounds"], task["quick"], seconds, compile=False, strict=False)
    print(perform(task["stage"], settings, task["file"]), flush=True)
    # All is written. Taking a CUDA context and the interpreter down takes a second or more of the others' time.
    os._exit(0)


if __name__ == "__main__":
    main()
