"""What the tests of the operators share: each backend on each device that it serves, poisoned memory, random numbers.

Test files load this as a plugin (``pytest_plugins``), for its fixtures, and import its functions. There is nothing here
for pytest to rewrite, which would warn that the module has been imported: PYTEST_DONT_REWRITE.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from nirvana import ops
from nirvana.evaluation.peak import Peak
from nirvana.ops.backends import BACKENDS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

#: Triton's interpreter takes milliseconds of Python a program, whatever it computes: big inputs are not for it.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Served(NamedTuple):
    """A backend, and a device whose tensors it serves."""

    device: str
    backend: str


def _served() -> list[Served]:
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    pairs = []
    for name, reason in ops.status().items():
        serves = ("cpu",) if name == "triton" and INTERPRETED else BACKENDS[name].devices or tuple(devices)
        if reason is None:
            pairs += [Served(device, name) for device in devices if device in serves]
    return pairs


SERVED = _served()
#: The kernels alone: what no reference does, such as matrices of more than 2^31 elements without copies of them.
KERNELS = [pair for pair in SERVED if pair.backend != "torch" and not (INTERPRETED and pair.backend == "triton")]
NEEDS_KERNELS = pytest.mark.skipif(not KERNELS, reason="no backend but the reference is available here")


@pytest.fixture(params=SERVED, ids="-".join)
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    """Run the test once a backend, with that backend forced."""
    with ops.use_backend(request.param.backend):
        yield request.param


@pytest.fixture
def device(served: Served) -> str:
    return served.device


@pytest.fixture
def backend(served: Served) -> str:
    return served.backend


@pytest.fixture
def sized(served: Served) -> None:
    """For tests of large inputs."""
    if INTERPRETED and served.backend == "triton":
        pytest.skip("too large for Triton's interpreter")


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nirvana.ops gets uninitialised is full of ones: NaN in every type that has it."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrapper(*args: object, **kwargs: object) -> Tensor:
        tensor = allocate(*args, **kwargs)
        if sys._getframe(1).f_globals.get("__name__", "").startswith(("nirvana.ops", "nirvana.kernels")):
            tensor.untyped_storage().fill_(0xFF)
        return tensor

    return wrapper


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int) -> Tensor:
    """Normal numbers, the same ones on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(device)


def draw_bits(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int) -> Tensor:
    """Any bit pattern that the type has: NaN with payloads, signed zeros, subnormal numbers."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty((), dtype=dtype).element_size()
    high = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, high, (math.prod(shape) * size,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).view(shape).to(device)


def equal_bits(first: Tensor, second: Tensor) -> bool:
    """torch.equal of the bytes: NaN equals NaN, 0 is not -0."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return torch.equal(_bytes(first), _bytes(second))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1).view(torch.uint8)


def short(dtypes: object) -> str:
    """Readable ids: torch.float32 is float32, a pair is float32-bfloat16."""
    if isinstance(dtypes, torch.dtype):
        return str(dtypes).removeprefix("torch.")
    return "-".join(map(short, dtypes)) if isinstance(dtypes, tuple) else str(dtypes)


def peak_growth(device: str, function: Callable[[], object]) -> int:
    """Bytes by which the peak memory during `function` exceeds the memory in use before it."""
    with Peak(device, give_back=True) as peak:
        function()
    if peak.bytes is None:
        pytest.skip("the peak of a process's memory can be reset on Linux alone")
    return peak.bytes
