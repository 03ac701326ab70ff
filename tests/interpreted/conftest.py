"""Numerics of the Triton kernels in Triton's interpreter, on CPU tensors.

Collected under TRITON_INTERPRET=1 alone, because Triton reads it when kernels are imported: tests/test_triton.py runs
this folder in a process of its own. A program costs milliseconds of Python whatever it computes, so matrices are small.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

# The folder above, for what all tests of operators share (tests/operators.py).
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def triton_backend() -> Iterator[None]:
    from nirvana import ops

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with ops.use_backend("triton"):
        yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def quick_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """At each call of a device function the interpreter looks for builtins in all of triton.language, for 0.5 ms, and
    finds none but at the first: it has replaced them. Without, kernels that call many take a fifth of the time."""
    from triton.runtime import interpreter

    is_builtin, names = interpreter.tl.core.is_builtin, {}

    def replace(package: object, builder: object, *scope: object) -> None:
        if package not in names:
            names[package] = [name for name, member in inspect.getmembers(package) if is_builtin(member)]
        # All or none of a package are replaced.
        if names[package] and is_builtin(getattr(package, names[package][0])):
            for name in names[package]:
                interpreter._patch_attr(package, name, getattr(package, name), builder, *scope)

    monkeypatch.setattr(interpreter, "_patch_builtin", replace)


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that the package gets uninitialised is full of ones: NaN in every type that has it."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def wrapper(*args: object, **kwargs: object) -> Tensor:
        tensor = allocate(*args, **kwargs)
        if sys._getframe(1).f_globals.get("__name__", "").startswith("nirvana."):
            tensor.untyped_storage().fill_(0xFF)
        return tensor

    return wrapper
