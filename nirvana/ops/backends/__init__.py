"""Which kernels serve an operator: the choice of backend, and why one is missing.

A backend is a module with the five functions of `Kernels`. They get tensors in normal form, checked, on one device and
not empty: matrices whose last stride is 1 (or whose last dimension is); a bias is a matrix of one row.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nirvana.errors import NirvanaError

AUTO = "auto"
ENVIRONMENT = "NIRVANA_BACKEND"


class Matrices(NamedTuple):
    """One reduction in normal form.

    Attributes:
        weight: ``[rows, columns]``, fp32, bf16 or fp16.
        grad: the same shape, any of these types; None where no statistic needs it.
        axis: 0 to sum over columns, 1 to sum over rows.
        group: rows or columns per unit.
        out: fp32 ``[statistics, units]``, contiguous; sums are added to it.
    """

    weight: Tensor
    grad: Tensor | None
    axis: int
    group: int
    out: Tensor


class Kernels(Protocol):
    """What a backend module defines."""

    def saliency(self, table: Sequence[Matrices], statistics: int) -> None:
        """Add the sums that the bits of `statistics` name (see `nirvana.ops.saliency`), rows in the order of the bits.
        Entries may share an `out`; they are added in the order of the table."""

    def gather(self, weights: Sequence[Tensor], kept: Tensor, axis: int, unit: int, outs: Sequence[Tensor]) -> None:
        """Write the kept units of each matrix to its contiguous `out`. Any element type. `kept` is int64, contiguous,
        in range, on the device of the weights."""

    def divergence(self, logits_p: Tensor, logits_q: Tensor, out: Tensor) -> None:
        """Write the KL of each row of two ``[tokens, vocabulary]`` matrices to `out`, fp32 ``[tokens]``."""

    def divergence_state(self, logits_p: Tensor, logits_q: Tensor, state: Tensor) -> None:
        """Write what `nirvana.ops.divergence.merge` adds up over chunks of the vocabulary, fp64 ``[5, tokens]``."""

    def mixture(
        self, scores: Tensor, max_components: int, low_density: int, low: Tensor, high: Tensor, components: Tensor
    ) -> None:
        """Write `nirvana.ops.mixture_bounds` of each row of `scores`, fp32 ``[units, m]``, contiguous; `low_density` of
        a row's scores are low-density at most."""


def _why_no_torch() -> str | None:
    return None


def _why_no_cpu() -> str | None:
    return _why_not_built("cpu", "a C++ compiler (g++ or clang++)")


def _why_no_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return "needs an NVIDIA GPU that torch can use (or TRITON_INTERPRET=1, which is slow and meant for tests)"


def _why_no_cuda() -> str | None:
    reason = _why_not_built("cuda", "nvcc on PATH and NIRVANA_CUDA=1")
    if reason is None and not torch.cuda.is_available():
        reason = "needs an NVIDIA GPU that torch can use"
    return reason


#: Interface between the Python and the C++ side; a module of another number is refused, not called.
NATIVE_INTERFACE = 3


def _why_not_built(name: str, needs: str) -> str | None:
    remedy = f"install nirvana again with {needs}"
    try:
        module = importlib.import_module(f"nirvana._{name}")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError)
        return f"not built: {remedy}" if missing else f"cannot be loaded ({error}): {remedy}"
    if getattr(module, "INTERFACE", None) != NATIVE_INTERFACE:
        return f"built from another version of nirvana: {remedy}"
    return None


class _Backend(NamedTuple):
    module: str
    devices: tuple[str, ...]  # empty: every device
    why_not: Callable[[], str | None]
    text: str


BACKENDS = {
    "torch": _Backend("reference", (), _why_no_torch, "pure PyTorch, every device"),
    "cpu": _Backend("cpu", ("cpu",), _why_no_cpu, "C++, CPU tensors"),
    "triton": _Backend("triton", ("cuda",), _why_no_triton, "Triton, NVIDIA GPUs"),
    "cuda": _Backend("cuda", ("cuda",), _why_no_cuda, "CUDA C++, NVIDIA GPUs"),
}

#: What `auto` takes, first available first. `cuda` serves on request only until it has been measured on a GPU.
PREFERENCE = {"cpu": ("cpu", "torch"), "cuda": ("triton", "torch")}

_forced = AUTO
_automatic: dict[str, Kernels] = {}


class use_backend:  # noqa: N801 - reads like torch.set_grad_enabled, and works like it
    """Force one backend, for the process or for a ``with`` block.

        nirvana.ops.use_backend("torch")          # from here on
        with nirvana.ops.use_backend("torch"):    # inside only

    Without it the environment variable NIRVANA_BACKEND decides, and without that the device of the tensors.

    Args:
        name: "auto", "torch", "cpu", "triton" or "cuda".

    Raises:
        NirvanaError: there is no such backend, or it is not available here; the message says how to get it.
    """

    def __init__(self, name: str):
        global _forced
        _check(name, "backend")
        self._before, _forced = _forced, name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *_: object) -> None:
        global _forced
        _forced = self._before


def status() -> dict[str, str | None]:
    """Backend name -> None where it is available, else one line that says why not and how to get it."""
    return {name: backend.why_not() for name, backend in BACKENDS.items()}


def choose(device: torch.device) -> Kernels:
    """The kernels for tensors on `device`.

    Raises:
        NirvanaError: a backend is forced that is missing, or that cannot serve this device.
    """
    name = _forced
    if name == AUTO:
        name = os.environ.get(ENVIRONMENT, AUTO)
        if name == AUTO:
            return _automatic.get(device.type) or _choose_automatically(device.type)
        _check(name, ENVIRONMENT)
    return _load(name, device.type)


def _choose_automatically(device: str) -> Kernels:
    for name in PREFERENCE.get(device, ("torch",)):
        if BACKENDS[name].why_not() is None:
            _automatic[device] = _load(name, device)
            break
    return _automatic[device]


def _check(name: str, what: str) -> None:
    if name == AUTO:
        return
    if name not in BACKENDS:
        raise NirvanaError(f"{what} {name!r} must be one of {AUTO}, {', '.join(BACKENDS)}")
    reason = BACKENDS[name].why_not()
    if reason is not None:
        raise NirvanaError(f"{what} {name!r} is not available: {reason}")


def _load(name: str, device: str) -> Kernels:
    devices = BACKENDS[name].devices
    interpreted = name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if devices and device not in devices and not interpreted:
        raise NirvanaError(
            f"backend {name!r} serves tensors on {', '.join(devices)}, not on {device}; "
            "move the model (--device), or choose 'auto' or 'torch'"
        )
    return importlib.import_module(f"nirvana.ops.backends.{BACKENDS[name].module}")
