"""A driver without a GPU: kernels are compiled for an architecture, loaded nowhere, and launched into nothing."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver


class StubDriver(CudaDriver):
    """For ``triton.runtime.driver.set_active``, which lasts as long as the process. CPU tensors serve as arguments.

    Args:
        architecture: 90 for sm_90.
    """

    def __init__(self, architecture: int):
        self.architecture = architecture
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
            # module, function, registers, spills, most threads
            load_binary=lambda *arguments: (None, 0, 0, 0, 1024),
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *arguments: None

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        # Kernels keep what was compiled for a device.
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0
