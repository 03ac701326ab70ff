"""csrc/cuda compiled by nvcc for each architecture: what the compiler made of the kernels, without a GPU."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
ARCHITECTURES = ("80", "90")
#: Those of setup.py.
FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
#: 65 536 registers a multiprocessor, 256 threads a block: what leaves two and three blocks.
TWO_BLOCKS, THREE_BLOCKS = 128, 80

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")


def _tool(name: str) -> str | None:
    """On PATH, or in the wheel of Triton, which brings its own."""
    if (found := shutil.which(name)) is not None:
        return found
    spec = importlib.util.find_spec("triton")
    path = spec and Path(spec.submodule_search_locations[0]) / "backends/nvidia/bin" / name
    return str(path) if path and path.exists() else None


@pytest.fixture(scope="module", params=SOURCES, ids=lambda path: path.stem)
def compiled(request, tmp_path_factory):
    """(name of the source, object file, what ptxas says)"""
    target = tmp_path_factory.mktemp("cuda") / "kernel.o"
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHITECTURES]
    command = ["nvcc", *FLAGS, *codes, "-Xptxas", "-v", "-Xcompiler", "-Wall", "-c", request.param, "-o", target]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "warning" not in run.stderr, run.stderr
    return request.param.stem, target, run.stderr


def test_nothing_is_spilled(compiled):
    name, _, report = compiled
    kernels = re.findall(
        r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        report,
        re.DOTALL,
    )
    assert {arch for _, arch, *_ in kernels} == set(ARCHITECTURES)
    assert len(kernels) == report.count("Compiling entry function")
    for kernel, arch, stack, stores, loads, registers in kernels:
        assert (stack, stores, loads) == ("0", "0", "0"), f"{kernel} for sm_{arch}: stack {stack}, spills {stores}"
        limit = TWO_BLOCKS if name == "saliency" else THREE_BLOCKS
        assert int(registers) <= limit, f"{kernel} for sm_{arch}: {registers} registers"


@pytest.mark.skipif(_tool("cuobjdump") is None, reason="no cuobjdump: neither a CUDA toolkit that has it nor Triton")
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_machine_code(compiled, arch):
    """128-bit loads are what they are meant to be; nothing lives in local memory, no float is added by an atomic."""
    name, target, _ = compiled
    command = [_tool("cuobjdump"), "-sass", "-arch", f"sm_{arch}", target]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions = dict(re.findall(r"Function : (\S+)(.*?)(?=Function : |\Z)", code, re.DOTALL))
    assert functions
    for function, text in functions.items():
        assert not re.search(r"\b(LDL|STL)\b", text), f"{function}: local memory"
        assert not re.search(r"\b(ATOM|ATOMG|RED)\.", text), f"{function}: atomics"
    wide = {function: text.count("LDG.E.128") for function, text in functions.items()}
    if name == "saliency":
        # Eight in flight, for 16-bit elements and for 32-bit ones, for each axis.
        assert sorted(wide.values()) == [0, 32, 32]
        tiles = [text for function, text in functions.items() if "sum_tiles" in function]
        # A sum of products in one fused operation would round otherwise than in two; divisions of integers fuse too.
        assert not any(re.search(r"FFMA(?!\.RM|\.RZ|\.RP)", text) for text in tiles)
    elif name == "divergence":
        # Eight in flight of aligned rows; none of others, nor where parts merge.
        assert sorted(wide.values()) == [0, 0, 8, 8]
        # An exponential is a product and one instruction: nothing compares with -126 to scale what is subnormal.
        assert not any(re.search(r"FSETP\.GEU\.AND P\d, PT, (\|?R\d+\|?), -126", text) for text in functions.values())
    else:
        assert sorted(count for count in wide.values() if count >= 8)[0] == 8
