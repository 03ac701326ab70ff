"""Limits that no kernel can beat: reading, and copying, the same bytes on the same device.

There is no one way that is fastest on every machine, so several honest ones are timed and the fastest counts.

    python -m nirvana.benchmarks.ceilings   # reads, copies and a bf16 product of the device, alone
"""

from __future__ import annotations

import importlib
import mmap
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from nirvana.benchmarks import environment, harness
from nirvana.benchmarks.harness import Job, Settings, Way

#: Bytes that are read or copied, and rows and columns of the square bf16 matrices that are multiplied.
SIZE, QUICK_SIZE = 2**30, 2**20
PRODUCT, QUICK_PRODUCT = 8192, 128


def reads(tensors: int, device: str) -> list[Way]:
    """Ways to read the first `tensors` inputs once; neighbours are of equal size. Bytes: theirs, none written."""
    ways = [Way("torch.sum of fp32 words", lambda *inputs: [_words(x).sum() for x in inputs[:tensors]])]
    native = _native(device)
    if native is not None:
        threads = torch.get_num_threads()

        def read(*inputs: Tensor) -> list[int]:
            pairs = zip(inputs[:tensors:2], inputs[1:tensors:2], strict=True)
            return [native.read_bytes(a.data_ptr(), b.data_ptr(), a.nbytes, threads) for a, b in pairs]

        ways.append(Way("C++ loop", read))
    return ways


def copies_to_new_memory(size: int, device: str) -> list[Way]:
    """Ways to copy the first `size` bytes of the first input into memory that is allocated for it. On a CPU that costs
    more than the copy: the system makes, and clears, every page, less so for huge pages. Bytes: `size` read + written.
    """
    ways = [Way("torch.clone", lambda first, *_: _bytes(first)[:size].clone())]
    native = _native(device)
    if native is not None:
        threads = torch.get_num_threads()

        def copy(first: Tensor, *_: object) -> Tensor:
            out = torch.empty(size, dtype=torch.uint8)
            native.copy_bytes(first.data_ptr(), out.data_ptr(), size, threads)
            return out

        ways.append(Way("C++ copy", copy))
    if torch.device(device).type == "cpu" and hasattr(mmap, "MADV_HUGEPAGE"):

        def huge(first: Tensor, *_: object) -> Tensor:
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(mmap.MADV_HUGEPAGE)
            return torch.frombuffer(memory, dtype=torch.uint8).copy_(_bytes(first)[:size])

        ways.append(Way("torch copy_ to huge pages", huge))
    return ways


def copies_to_existing_memory(size: int, device: str) -> list[Way]:
    """The same into a buffer that is there already. Bytes: `size` read + `size` written."""
    out = torch.zeros(size, dtype=torch.uint8, device=device)
    ways = [Way("torch copy_", lambda first, *_: out.copy_(_bytes(first)[:size]))]
    native = _native(device)
    if native is not None:
        threads = torch.get_num_threads()
        ways.append(
            Way("C++ copy", lambda first, *_: native.copy_bytes(first.data_ptr(), out.data_ptr(), size, threads))
        )
    return ways


def _native(device: str) -> ModuleType | None:
    if torch.device(device).type != "cpu":
        return None
    try:
        return importlib.import_module("nirvana._cpu")
    except ImportError:
        return None


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)


def _words(tensor: Tensor) -> Tensor:
    """The bytes as fp32: pairs of 16-bit numbers make meaningless values, but adding those takes no longer."""
    flat = tensor.view(-1)
    size = 4 // flat.element_size()
    return flat[: flat.numel() // size * size].view(torch.float32)


def run(settings: Settings) -> dict[str, Any]:
    """Records of the device's own speed; ``copy_tb_per_s`` is what other results are set beside."""
    size, rows = (QUICK_SIZE, QUICK_PRODUCT) if settings.quick else (SIZE, PRODUCT)
    device = settings.device
    peak = environment.peak_tb_per_s(device)
    memory = [torch.zeros(size // 4, device=device) for _ in range(2)]
    records = []
    for what, ways, moved in (
        ("copy", copies_to_existing_memory(size, device), 2 * size),
        ("read", reads(2, device), 2 * size),
    ):
        best = _best(what, ways, tuple(memory), moved, settings)
        records.append({"what": what, **best, "tflop_per_s": None})
        records[-1]["of_peak"] = peak and best["tb_per_s"] / peak
    left, right = (torch.randn(rows, rows, device=device).bfloat16() for _ in range(2))
    best = _best("product", [Way(f"torch.mm, {rows}^3", torch.mm)], (left, right), 3 * left.nbytes, settings)
    records.append({"what": "product bf16", **best, "tflop_per_s": 2 * rows**3 / best["p50_ms"] / 1e9, "of_peak": None})
    copy = records[0]["tb_per_s"]
    headlines = [
        f"copy {copy:.2f} TB/s, read {records[1]['tb_per_s']:.2f} TB/s, data sheet {peak or '-'} TB/s, "
        f"bf16 product {records[2]['tflop_per_s']:.0f} TFLOP/s"
    ]
    result = harness.document("ceilings", settings, [], limits_of_the_device=records)
    return result | {"copy_tb_per_s": copy, "headlines": headlines}


def _best(what: str, ways: list[Way], inputs: tuple, moved: int, settings: Settings) -> dict[str, Any]:
    job = Job(what, moved, ways, {}, [inputs], lambda *_: None)
    figures = harness.measure(job, settings)["ways"]
    name = min(figures, key=lambda way: figures[way]["p50_ms"])
    p50 = figures[name]["p50_ms"]
    return {"way": name, "p50_ms": p50, "tb_per_s": moved / p50 / 1e9}


def main() -> None:
    args = harness.parser(__doc__).parse_args()
    harness.finish(run(harness.settings(args)), args.json)


if __name__ == "__main__":
    main()
