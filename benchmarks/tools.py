"""Other programs as stages: the compiler, the test suite, compute-sanitizer, the profiler; and our own pass in many
processes. Each gives a document; what is missing here is a `SkipError` with the reason."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from nirvana.benchmarks import harness
from nirvana.benchmarks.harness import Settings, SkipError

#: In the order of what matters most, should the time run out.
TESTS = [f"tests/test_ops_{name}.py" for name in ("saliency", "gather", "divergence", "mixture")]
TEST_PROCESSES = 12
#: Exit code of pytest where no test was chosen.
NO_TESTS = 5
SANITIZER = "compute-sanitizer"
#: Where nobody can be asked: an H100 or H200.
ARCH = "90"


def build(settings: Settings) -> Iterator[dict[str, Any]]:
    """Both native modules, in place and nothing else; for the GPU that is here."""
    arch = ARCH
    if torch.device(settings.device).type == "cuda":
        arch = "".join(map(str, torch.cuda.get_device_capability(settings.device)))
    if not Path("setup.py").is_file():
        raise SkipError("no setup.py here; run in the repository")
    wishes = {"NIRVANA_CUDA": "auto", "NIRVANA_CUDA_ARCHS": arch}
    code, output = call([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], settings, **wishes)
    failed = [line for line in output.splitlines() if " was not built" in line]
    if code != 0 or failed:
        raise RuntimeError(failed[0] if failed else f"setup.py: {ending(code)}")
    modules = [{"module": file.name, "bytes": file.stat().st_size} for file in built_modules()]
    there = any(module["module"].startswith("_cuda.") for module in modules)
    note = None
    if shutil.which("nvcc") is None:
        note = f"{'with an older' if there else 'without the'} CUDA module: nvcc is not on PATH"
    elif not there:
        note = "without the CUDA module: nvcc has no libcudart_static.a"
    yield _document("build", settings, [note or f"CUDA module for sm_{arch}"], modules=modules) | {"note": note}


def built_modules() -> list[Path]:
    """The native modules for this Python in the working tree."""
    return sorted(Path("nirvana").glob(f"_*.{sys.implementation.cache_tag}-*.so"))


def warm_up(settings: Settings) -> Iterator[dict[str, Any]]:
    """Every check of Triton once, in as many processes as there are cores: compiling is most of it, and stays on disk
    for all stages that come after."""
    if torch.device(settings.device).type != "cuda" or "triton" not in harness.backends(settings.device):
        raise SkipError(f"Triton does not serve {settings.device} here")
    parts = max(1, len(os.sched_getaffinity(0)) - 2)
    command = [sys.executable, "-m", "nirvana.benchmarks.correctness", "--device", settings.device]
    command += ["--backend", "triton", *(["--quick"] if settings.quick else [])]
    start = time.monotonic()
    with ThreadPoolExecutor(parts) as pool:
        runs = list(pool.map(lambda i: call([*command, "--part", f"{i}/{parts}"], settings, False), range(parts)))
    failures = []
    for code, output in runs:
        if code != 0:
            print(output)
            failures.append(f"{ending(code)}: {output.strip().splitlines()[-1] if output.strip() else 'nothing said'}")
    line = f"{parts} processes, {time.monotonic() - start:.0f} s"
    yield _document("triton warm-up", settings, [line]) | {"failures": failures}


def tests(settings: Settings) -> Iterator[dict[str, Any]]:
    """The test suite of the operators on this device."""
    if importlib.util.find_spec("pytest") is None:
        raise SkipError("pytest is not installed")
    if not Path(TESTS[0]).is_file():
        raise SkipError("no tests here; run in the repository")
    gpu = torch.device(settings.device).type == "cuda"
    # A line for each test (-v): those that failed are else named at the end only, which may not come.
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "--maxfail=20", "-p", "no:cacheprovider"]
    command += ["-k", "cuda-triton or cuda-cuda" if gpu else "cpu-cpu"]
    workers = min(TEST_PROCESSES, len(os.sched_getaffinity(0)))
    if importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(workers)]
    with tempfile.TemporaryDirectory() as folder:
        code, output = call([*command, *TESTS], settings, HYPOTHESIS_STORAGE_DIRECTORY=folder)
    if code == NO_TESTS:
        raise SkipError(f"no kernel serves {settings.device} here")
    if code is None:
        done = re.findall(r"\[ *(\d+%)\]", output)
        line = f"not finished in its time, {done[-1] if done else '0%'} done"
        failed = [found.strip() for found in re.findall(r"(?:FAILED|ERROR) .*::.*|.*::.* (?:FAILED|ERROR)", output)]
        if failed:
            line += f"; {'; '.join(failed)}"
        elif "PASSED" not in output:
            failed = [line]
    else:
        line, failed = (output.strip().splitlines() or ["nothing said"])[-1].strip("= "), code != 0
    yield _document("tests", settings, [line]) | {"failures": [line] if failed else [], "note": line}


def memcheck(settings: Settings) -> Iterator[dict[str, Any]]:
    """Accesses out of bounds. Without the caching allocator: inside its large blocks they would go unseen."""
    yield _sanitize("memcheck", settings, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def racecheck(settings: Settings) -> Iterator[dict[str, Any]]:
    """Races in shared memory."""
    yield _sanitize("racecheck", settings)


def _sanitize(tool: str, settings: Settings, **environment: str) -> dict[str, Any]:
    if torch.device(settings.device).type != "cuda":
        raise SkipError("not on a GPU")
    if shutil.which(SANITIZER) is None:
        raise SkipError(f"{SANITIZER} is not on PATH")
    # Libraries ask a driver for functions that it does not have: calls that fail are no errors of kernels.
    command = [SANITIZER, "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9", sys.executable]
    command += ["-m", "nirvana.benchmarks.correctness", "--quick", "--device", settings.device]
    kernels = ",".join(name for name in harness.backends(settings.device) if name != "torch")
    code, output = call([*command, "--backend", kernels], settings, **environment)
    if "Device not supported" in output:
        raise SkipError(f"{SANITIZER} does not support this device")
    if code is None:
        # It prints what it finds when it finds it, each behind such a sign; the first line is its name.
        found = re.findall(r"^=+ (?!COMPUTE-SANITIZER)(\S.*)", output, re.MULTILINE)
        if found:
            raise RuntimeError(f"not finished in its time, but found: {found[0]}")
        raise SkipError("not finished in its time; nothing found so far")
    if code:
        found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", output)
        raise RuntimeError(found[-1] if found else f"{SANITIZER}: {ending(code)}")
    return _document(tool, settings, [f"{kernels}: 0 errors"])


def call(command: list[str], settings: Settings, show: bool = True, **environment: str) -> tuple[int | None, str]:
    """Exit code and output of a program, which is also printed; None as the code where its time was not enough."""
    left = None if settings.seconds is None else max(1.0, settings.left)
    try:
        run = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            timeout=left,
        )
        code, output = run.returncode, run.stdout
    except subprocess.TimeoutExpired as late:
        code, output = None, late.stdout or b""
    text = output.decode(errors="replace")
    if show:
        print(text, flush=True)
    return code, text


def ending(code: int | None) -> str:
    return "not finished in its time" if code is None else f"exit code {code}"


def _document(name: str, settings: Settings, headlines: list[str], **records: list[dict[str, Any]]) -> dict[str, Any]:
    return harness.document(name, settings, [], **records) | {"headlines": headlines}
