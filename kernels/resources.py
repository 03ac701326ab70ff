"""What the kernels need of a GPU, without one: registers, stack, shared memory and wide loads of compiled code.

``python -m nirvana.kernels.resources`` compiles every case below for four architectures and writes the table
RESOURCES.md beside this file. The launchers themselves ask for the compilations, so what stands in the table is what
runs.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

from nirvana.kernels import divergence, gather, mixture, saliency
from nirvana.kernels.config import DivergenceConfig
from nirvana.kernels.stub import StubDriver
from nirvana.ops.backends import Matrices
from nirvana.ops.saliency import STATISTICS

ARCHITECTURES = (80, 90, 100, 120)
TABLE = Path(__file__).with_name("RESOURCES.md")
ALL = sum(STATISTICS.values())
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class Resources(NamedTuple):
    """One compiled specialisation. Counts are of machine instructions."""

    registers: int  # a thread
    stack: int  # bytes a thread: not 0 means spilled registers
    spills: int  # loads and stores of local memory
    shared: int  # bytes a program
    wide_loads: int  # of 128 bits
    early_loads: int  # of those how many are issued before the first is waited for
    wide_stores: int


class Case(NamedTuple):
    """One specialisation: a call, and which of the kernels that it launches."""

    kernel: str
    text: str
    launch: Callable[[], None]
    place: int = 0


def _zeros(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(rows, columns, dtype=dtype)


def _saliency(weight: torch.dtype, grad: torch.dtype, mask: int, columns: int = 256, entries: int = 1) -> Case:
    names = " + ".join(name for name, bit in STATISTICS.items() if mask & bit) if mask != ALL else "all six"
    aligned = "" if columns % 16 == 0 else ", rows not aligned"
    table = "" if entries == 1 else ", a table"

    def launch() -> None:
        out = torch.zeros(mask.bit_count(), 64)
        matrices = Matrices(_zeros(64, columns, weight), _zeros(64, columns, grad), 0, 1, out)
        saliency.saliency([matrices] * entries, mask)

    return Case("saliency tiles", f"{_NAMES[weight]} weight, {_NAMES[grad]} grad, {names}{aligned}{table}", launch)


def _gather(bits: int, axis: int, unit: int, columns: int, text: str, entries: int = 1) -> Case:
    dtype = {16: torch.int16, 32: torch.int32}[bits]

    def launch() -> None:
        kept = torch.arange(16)
        outs = [_zeros(16 * unit, columns, dtype) if axis == 0 else _zeros(64, 16 * unit, dtype)] * entries
        gather.gather([_zeros(16 * unit, columns, dtype)] * entries, kept, axis, unit, outs)

    return Case("gather", text, launch)


def _divergence(dtype: torch.dtype, vocabulary: int, *, state: bool = False, place: int = 0) -> Case:
    aligned = "" if vocabulary % 16 == 0 else ", rows not aligned"
    split = DivergenceConfig().span(4, vocabulary) < vocabulary
    to = "state" if state else "result"

    def launch() -> None:
        p, q = _zeros(4, vocabulary, dtype), _zeros(4, vocabulary, dtype)
        if state:
            divergence.divergence_state(p, q, torch.zeros(5, 4, dtype=torch.float64))
        else:
            divergence.divergence(p, q, torch.zeros(4))

    if place:
        return Case("divergence parts", to, launch, place)
    return Case("divergence", f"{_NAMES[dtype]}, {'part' if split else to}{aligned}", launch)


def _mixture(kernel: str, text: str, place: int, length: int = 1728) -> Case:
    def launch() -> None:
        low, high = torch.zeros(4), torch.zeros(4)
        mixture.mixture(_zeros(4, length, torch.float32), 5, 2, low, high, torch.zeros(4, dtype=torch.int32))

    return Case(f"mixture {kernel}", text, launch, place)


_FP32, _BF16 = torch.float32, torch.bfloat16
#: Kernel, specialisation, call. The types and masks that scoring uses, and of the rest those with most registers.
CASES: list[Case] = [
    _saliency(_BF16, _BF16, STATISTICS["taylor"]),
    _saliency(_FP32, _FP32, STATISTICS["taylor"]),
    _saliency(_BF16, _FP32, STATISTICS["taylor"]),
    _saliency(_BF16, _BF16, STATISTICS["taylor"], columns=255),
    _saliency(_FP32, _FP32, STATISTICS["taylor"] | STATISTICS["fisher"]),
    _saliency(_FP32, _FP32, STATISTICS["ntk"]),
    _saliency(_FP32, _FP32, STATISTICS["magnitude"]),
    _saliency(_BF16, _BF16, ALL),
    _saliency(_FP32, _FP32, ALL),
    _saliency(_BF16, _BF16, ALL, columns=255),
    _saliency(_BF16, _BF16, STATISTICS["taylor"], entries=2),
    _saliency(_FP32, _FP32, STATISTICS["taylor"], entries=2),
    _saliency(_BF16, _FP32, STATISTICS["taylor"], entries=2),
    _saliency(_FP32, _FP32, STATISTICS["taylor"] | STATISTICS["fisher"], entries=2),
    _saliency(_FP32, _FP32, ALL, entries=2),
    Case("saliency totals", "", _saliency(_FP32, _FP32, STATISTICS["taylor"]).launch, 1),
    Case("saliency totals", "a table", _saliency(_FP32, _FP32, STATISTICS["taylor"], entries=2).launch, 1),
    _gather(16, 0, 1, 256, "rows, 8 bytes, aligned"),
    _gather(16, 0, 64, 256, "rows in units, 8 bytes, aligned"),
    _gather(16, 0, 64, 256, "rows in units, 8 bytes, aligned, table", entries=2),
    _gather(16, 0, 1, 255, "rows, 2 bytes"),
    _gather(16, 1, 1, 256, "columns, 2 bytes"),
    _gather(16, 1, 1, 256, "columns, 2 bytes, table", entries=2),
    _gather(32, 1, 1, 256, "columns, 4 bytes"),
    _gather(16, 1, 64, 1024, "columns in units, 8 bytes"),
    _divergence(_BF16, 512),
    _divergence(_FP32, 512),
    _divergence(_FP32, 512, state=True),
    _divergence(_BF16, 511),
    _divergence(_BF16, 16_384),
    _divergence(_BF16, 16_384, place=1),
    _mixture("standardisation", "1728 scores", 0),
    *(_mixture("fit", f"{k} component{'s'[: k > 1]}, 1728 scores", k) for k in range(1, 6)),
    _mixture("fit", "3 components, 12288 scores", 3, 12_288),
    _mixture("fit", "5 components, 12288 scores", 5, 12_288),
    _mixture("density", "1728 scores", 6),
    _mixture("ends", "1728 scores", 7),
]


def measure(architectures: tuple[int, ...] = ARCHITECTURES, processes: int | None = None) -> dict[int, list[Resources]]:
    """Resources of each of `CASES`, in order, for each architecture (80 for sm_80)."""
    workers = processes or min(len(architectures), os.cpu_count() or 1)
    # Processes of their own, because the stub driver would stay for the whole process.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return dict(zip(architectures, pool.map(_measure, architectures), strict=True))


def render(measured: dict[int, list[Resources]]) -> str:
    """The text of RESOURCES.md."""
    lines = [
        f"Resources of the compiled kernels, Triton {triton.__version__}; written by "
        "`python -m nirvana.kernels.resources`.",
        "",
        "No GPU took part: these are properties of the machine code. No case uses stack or local memory, which would "
        "mean spilled registers. Wide instructions are those of 128 bits, counted in the code; early loads are the "
        "wide ones before the first instruction that waits for one of them: what a thread has in flight.",
        "",
        "| kernel | case | wide loads | early loads | wide stores | "
        + " | ".join(f"sm_{architecture}: registers, shared KiB" for architecture in measured)
        + " |",
        "| --- | --- | --- | --- | --- |" + " --- |" * len(measured),
    ]
    for index, case in enumerate(CASES):
        row = [of_architecture[index] for of_architecture in measured.values()]
        cells = [
            case.kernel,
            case.text,
            _distinct(one.wide_loads for one in row),
            _distinct(one.early_loads for one in row),
            _distinct(one.wide_stores for one in row),
            *(f"{one.registers}, {one.shared / 1024:.3g}" for one in row),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _distinct(values: Iterator[int]) -> str:
    return " / ".join(str(value) for value in dict.fromkeys(values))


def _measure(architecture: int) -> list[Resources]:
    results = []
    for case in CASES:
        with _compile_only(architecture) as compiled:
            case.launch()
        results.append(_inspect(compiled[case.place]))
    return results


@contextmanager
def _compile_only(architecture: int) -> Iterator[list[Any]]:
    """Inside, launches on CPU tensors compile for `architecture` and do not run; yields what was compiled."""
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        compiled.append(run(self, *arguments, grid=grid, warmup=True, **options))
        return compiled[-1]

    triton.runtime.driver.set_active(StubDriver(architecture))
    with mock.patch.object(JITFunction, "run", compile_only):
        yield compiled


def _inspect(kernel: Any) -> Resources:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        tool = triton.knobs.nvidia.cuobjdump.path
        command = [tool, "--dump-resource-usage", "-sass", cubin]
        text = subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return Resources(
        registers=int(registers),
        stack=int(stack),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", text)),
        shared=kernel.metadata.shared,
        wide_loads=len(re.findall(r"\b(?:LDG|LDGSTS)\.[A-Z.]*128\b", text)),
        early_loads=_early_loads(text),
        wide_stores=len(re.findall(r"\bSTG\.[A-Z.]*128\b", text)),
    )


def _early_loads(text: str) -> int:
    """128-bit loads before the first instruction that reads a register that one of them fills, or that waits for
    copies to shared memory (DEPBAR)."""
    filled: set[int] = set()
    loads = 0
    for line in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", text):
        name, _, operands = re.sub(r"^@!?U?P\w+\s+", "", line).partition(" ")
        registers = [int(number) for number in re.findall(r"\bR(\d+)", operands)]
        wide = re.match(r"(LDG|LDGSTS)\.[A-Z.]*128$", name.replace(".CONSTANT", ""))
        read = registers[1:] if wide and wide[1] == "LDG" else registers
        if loads and (name.startswith("DEPBAR") or not filled.isdisjoint(read)):
            break
        if wide:
            loads += 1
            filled.update(range(registers[0], registers[0] + 4) if wide[1] == "LDG" else ())
    return loads


def spilled(measured: dict[int, list[Resources]]) -> list[str]:
    """One line for each case that spills registers. It must be empty: local memory would cost more than it saves."""
    return [
        f"sm_{architecture}, {case.kernel}, {case.text}: {one.stack} bytes of stack, {one.spills} loads and stores"
        for architecture, results in measured.items()
        for case, one in zip(CASES, results, strict=True)
        if one.stack or one.spills
    ]


def main() -> None:
    measured = measure()
    if spilled(measured):
        raise SystemExit("\n".join(["registers are spilled:", *spilled(measured)]))
    TABLE.write_text(render(measured))


if __name__ == "__main__":
    main()
