"""Four kernels of each backend under ncu: what they ask of the memory, and how full the multiprocessors are.

python -m nirvana.benchmarks.profiled [--quick]              # only calls them, between profiler start and stop
ncu --clock-control none --profile-from-start off ... python -m nirvana.benchmarks.profiled
"""

from __future__ import annotations

import csv
import io
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from nirvana.benchmarks import harness, kl, saliency, tools
from nirvana.benchmarks.harness import Settings, SkipError
from nirvana.ops import gather_slice, group_saliency, kl_divergence, use_backend

#: Column of the record -> metric of ncu.
METRICS = {
    "us": "gpu__time_duration.sum",
    "memory": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "read": "dram__bytes_read.sum",
    "written": "dram__bytes_write.sum",
    "issue": "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "warps": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
}
#: What ncu says where reading the counters is the administrator's alone.
NOT_ALLOWED = "ERR_NVGPUCTRPERM"
#: And where a sandbox keeps it from the driver.
NO_PROFILER = "Failed to initialize the profiler"


def calls(settings: Settings) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Rows, columns, a gather of columns, and KL, of the sizes of 8 billion parameters in bf16."""
    device = settings.device
    rows, columns, tokens, vocabulary = (96, 64, 8, 300) if settings.quick else (14336, 4096, 512, 128256)
    weight, grad = saliency.draw(rows, columns, torch.bfloat16, device, 0)
    kept = torch.randperm(rows, device=device)[: rows // 2].sort()[0]
    p, q = kl.draw(tokens, vocabulary, torch.bfloat16, device, 0)
    down, down_grad = weight.view(columns, rows), grad.view(columns, rows)
    yield "saliency rows", lambda: group_saliency(weight, grad, axis=0, group=1)
    yield "saliency columns", lambda: group_saliency(down, down_grad, axis=1, group=1)
    yield "gather columns", lambda: gather_slice(down, kept, axis=1)
    yield "divergence", lambda: kl_divergence(p, q)


def profile(settings: Settings) -> Iterator[dict[str, Any]]:
    """The stage: runs ncu on this module."""
    if torch.device(settings.device).type != "cuda":
        raise SkipError("not on a GPU")
    if shutil.which("ncu") is None:
        raise SkipError("ncu is not on PATH")
    # The clock as the benchmarks find it, and caches cleared before each pass, which is the default.
    command = ["ncu", "--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw"]
    # Of one scale in all rows: the table has a single line of units.
    command += ["--print-units", "base"]
    command += ["--metrics", ",".join(METRICS.values()), sys.executable, "-m", "nirvana.benchmarks.profiled"]
    command += ["--device", settings.device, *(["--quick"] if settings.quick else [])]
    code, output = tools.call(command, settings)
    if NOT_ALLOWED in output:
        raise SkipError(f"ncu may not read the counters here ({NOT_ALLOWED})")
    if NO_PROFILER in output:
        raise SkipError(f"ncu does not work here: {NO_PROFILER}")
    if code != 0:
        raise RuntimeError(f"ncu: {tools.ending(code)}")
    records = parse(output)
    headlines = [
        f"{r['kernel'][:40]}: {_text(r['us'], 1)} us, memory {_text(r['memory'])} %, issue {_text(r['issue'])} %, "
        f"warps {_text(r['warps'])} %, {_text(r['registers'])} registers"
        for r in records
    ]
    yield harness.document("ncu", settings, [], kernels=records) | {"headlines": headlines}


def parse(output: str) -> list[dict[str, Any]]:
    """A record a kernel of what ``ncu --csv --page raw`` prints: lines of its own and of the program, a header, units,
    values. Bytes and microseconds are brought to their unit; None where this GPU does not count something.

    Raises:
        ValueError: no table is in it.
    """
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise ValueError("ncu printed no table")
    # Anything behind it that is no row is the program's own.
    table = [line for line in lines[start:] if line.startswith('"')]
    header, units, *rows = csv.reader(io.StringIO("\n".join(table)))
    scales = {"byte": 1, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "ns": 1e-3, "nsecond": 1e-3, "us": 1, "usecond": 1}
    scales |= {"ms": 1e3, "msecond": 1e3, "s": 1e6, "second": 1e6}
    records = []
    for row in rows:
        values = dict(zip(header, row, strict=True))
        record: dict[str, Any] = {"kernel": values["Kernel Name"]}
        for name, metric in METRICS.items():
            value = _number(values.get(metric, ""))
            record[name] = value and value * scales.get(units[header.index(metric)], 1)
        records.append(record)
    return records


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:  # n/a, or a column that is not there
        return None


def _text(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def main() -> None:
    settings = harness.settings(harness.parser(__doc__).parse_args())
    backends = [name for name in harness.backends(settings.device) if name != "torch"]
    gpu = torch.device(settings.device).type == "cuda"
    for name, call in calls(settings):
        for backend in backends:
            with use_backend(backend):
                call()  # compiles
                if gpu:
                    torch.cuda.synchronize()
                    torch.cuda.profiler.start()
                call()
                if gpu:
                    torch.cuda.synchronize()
                    torch.cuda.profiler.stop()
            print(name, backend, flush=True)


if __name__ == "__main__":
    main()
