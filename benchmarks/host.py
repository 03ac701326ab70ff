"""What calls of the saliency kernels cost in Python: with a driver that compiles and launches nothing, on any machine.

python -m nirvana.benchmarks.host

A call is worth nothing to a GPU that has finished before Python has prepared the next one. Not in these figures: what
only a GPU's driver and allocator take, which is a few microseconds a launch and a table.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import torch

from nirvana.benchmarks.shapes import MODELS
from nirvana.ops import SaliencyEntry, foreach_group_saliency, group_saliency, plan_group_saliency
from nirvana.ops.backends import Kernels

MODEL = "SmolLM2-135M"
#: The shortest of so many runs: other work on the machine only lengthens them.
RUNS = 200


def entries_of(model: str) -> list[SaliencyEntry]:
    """Every matrix of a model in bf16, of memory that nothing has touched: no kernel reads it."""
    shapes = MODELS[model]
    entries = []
    for matrix in shapes.layer_matrices() * shapes.layers:
        weight, grad = (torch.empty(matrix.rows, matrix.columns, dtype=torch.bfloat16) for _ in range(2))
        out = torch.empty((matrix.rows, matrix.columns)[matrix.axis] // matrix.group)
        entries.append(SaliencyEntry(weight, grad, matrix.axis, matrix.group, out))
    return entries


def triton_backend() -> Kernels:
    import triton

    from nirvana.kernels.stub import StubDriver
    from nirvana.ops.backends import triton as backend

    triton.runtime.driver.set_active(StubDriver(90))
    return backend


def cuda_backend() -> Kernels:
    native = SimpleNamespace(saliency=lambda *numbers: None)
    with mock.patch.dict(sys.modules, {"nirvana._cuda": native}), mock.patch("nirvana._cuda", native, create=True):
        from nirvana.ops.backends import cuda as backend
    backend._queue = lambda device: (0, 0)
    return backend


@contextmanager
def serving(backend: Kernels) -> Iterator[None]:
    """CPU tensors go to `backend`."""
    with (
        mock.patch("nirvana.ops.saliency.choose", return_value=backend),
        mock.patch("nirvana.ops.saliency_plan.choose", return_value=backend),
    ):
        yield


def microseconds(call: Callable[[], object], repeats: int) -> float:
    """Of one call: the shortest of `RUNS` runs of `repeats` each."""
    call()
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        times.append((time.perf_counter() - start) / repeats)
    return min(times) * 1e6


def calls(entries: list[SaliencyEntry]) -> Iterator[tuple[str, Callable[[], object], int]]:
    """What is measured, and how often in a run."""
    weight, grad, axis, group, out = entries[0]
    one = functools.partial(group_saliency, weight, grad, axis=axis, group=group)
    yield "group_saliency", one, 10
    yield "group_saliency(out=)", functools.partial(one, out=out), 10
    yield "plan() of one matrix", plan_group_saliency(entries[:1]), 10
    plan = plan_group_saliency(entries)
    yield f"foreach_group_saliency of {len(entries)}", functools.partial(foreach_group_saliency, entries), 1
    yield f"plan_group_saliency of {len(entries)}", functools.partial(plan_group_saliency, entries), 1
    yield f"plan() of {len(entries)}", plan, 10
    grads = [torch.empty_like(entry.grad) for entry in entries]
    yield f"plan(grads=) of {len(entries)}", functools.partial(plan, grads=grads), 1


def main() -> None:
    torch.set_num_threads(1)
    entries = entries_of(MODEL)
    print("| call | backend | Python, us |\n| --- | --- | --- |")
    for name, load in (("triton", triton_backend), ("cuda", cuda_backend)):
        with serving(load()):
            for text, call, repeats in calls(entries):
                print(f"| {text} | {name} | {microseconds(call, repeats):.1f} |")


if __name__ == "__main__":
    main()
