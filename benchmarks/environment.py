"""What the figures were measured with."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import nirvana
from nirvana.ops import status


def describe(device: str) -> dict[str, Any]:
    """Machine, versions and backends. The load tells whether the machine had other work as well."""
    result: dict[str, Any] = {
        "device": device,
        "cpu": _processor(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "last_level_cache_bytes": last_level_cache(),
        "load": round(os.getloadavg()[0], 2),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "nirvana": nirvana.__version__,
        "backends": {name: reason or "available" for name, reason in status().items()},
    }
    if torch.device(device).type == "cuda":
        about = torch.cuda.get_device_properties(device)
        result |= {
            "gpu": about.name,
            "gpu_memory_bytes": about.total_memory,
            "gpu_multiprocessors": about.multi_processor_count,
            "gpu_l2_bytes": about.L2_cache_size,
            "gpu_arch": f"{about.major}{about.minor}",
            "gpu_peak_tb_per_s": peak_tb_per_s(device),
            "cuda": torch.version.cuda,
        }
    return result


#: TB/s of the memory by the data sheets. Other forms of a card (H100 PCIe, NVL) have other memory.
PEAKS = {"H100 80GB HBM3": 3.35, "H200": 4.8}


def peak_tb_per_s(device: str) -> float | None:
    """Memory bandwidth of a GPU by its data sheet; None for those that are not in `PEAKS`."""
    if torch.device(device).type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for card, peak in PEAKS.items() if card in name), None)


def last_level_cache() -> int:
    """Bytes; 32 MiB where the system does not say."""
    sizes = [32 * 2**20]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number, unit = file.read_text().strip()[:-1], file.read_text().strip()[-1]
        if number.isdigit() and unit in "KM":
            sizes.append(int(number) * {"K": 2**10, "M": 2**20}[unit])
    return max(sizes[1:] or sizes)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
