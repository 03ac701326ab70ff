"""The source distribution, the wheel made from it, and the install where no compiler can be found."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: What of the checkout a build reads; caches and environments beside it would take minutes to copy.
SOURCES = [
    "pyproject.toml",
    "setup.py",
    "README.md",
    "LICENSE",
    "MANIFEST.in",
    "nirvana",
    "kernels",
    "benchmarks",
    "csrc",
]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


def run(*command: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    process = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": "", "NIRVANA_CUDA": "0", **environment},
        check=False,
    )
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    return process


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "results"))
        else:
            shutil.copy(source, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(checkout: Path) -> Path:
    """Made from the source distribution, not from the checkout: what is missing there shows here."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", checkout / "dist", cwd=checkout)
    return next((checkout / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment that sees the libraries of this one, but no nirvana: a path line runs no .pth files, so an
    editable install is not followed."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    (packages / "libraries.pth").write_text("\n".join([*site.getsitepackages(), ""]))
    return folder / "bin" / "python"


def install(python: Path, wheel: Path) -> None:
    run(
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--force-reinstall",
        "--no-index",
        wheel,
        cwd=wheel.parent,
    )


def info(python: Path, folder: Path) -> dict[str, object]:
    return json.loads(run(python, "-m", "nirvana.cli", "info", "--json", cwd=folder).stdout)


def test_the_wheel_holds_the_kernels_and_nothing_of_torch(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        module = next(name for name in names if name.startswith("nirvana/_cpu."))
        content = archive.read(module)
    assert {"nirvana/kernels/saliency.py", "nirvana/benchmarks/saliency.py"} <= set(names)
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"nirvana"}, "a top-level module `kernels` would hide another distribution's"
    for library in (b"libtorch", b"libgomp", b"libc10"):
        assert library not in content


def test_the_wheel_runs_in_a_clean_environment(wheel, python, tmp_path):
    install(python, wheel)
    assert info(python, tmp_path)["backends"]["cpu"] is None
    script = (
        "import nirvana, torch; from nirvana import ops; import nirvana.benchmarks.harness;"
        "w, g = torch.randn(12, 7), torch.randn(12, 7);"
        "ops.use_backend('cpu'); ours = ops.group_saliency(w, g, axis=0, group=3);"
        "torch.testing.assert_close(ours, (w * g).abs().sum(1).view(4, 3).sum(1));"
        "print(nirvana.__file__)"
    )
    assert str(python.parents[1]) in run(python, "-c", script, cwd=tmp_path).stdout


def test_without_a_compiler_the_install_goes_on_and_says_so(checkout, python, tmp_path):
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-v",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        tmp_path,
        ".",
    ]
    process = run(*build, cwd=checkout, CXX="no-such-compiler")
    said = process.stdout + process.stderr
    assert "nirvana._cpu was not built, the install goes on without it: no C++ compiler (no-such-compiler)" in said
    install(python, next(tmp_path.glob("*.whl")))
    reason = info(python, tmp_path)["backends"]["cpu"]
    assert reason == "not built: install nirvana again with a C++ compiler (g++ or clang++)"
    script = (
        "import torch; from nirvana import ops; ones = torch.ones(4, 6);"
        "assert ops.group_saliency(ones, ones, axis=0, group=2).tolist() == [12.0, 12.0]"
    )
    run(python, "-c", script, cwd=tmp_path)


def test_cuda_that_is_a_must_is_refused_without_nvcc(checkout, tmp_path):
    command = [sys.executable, "setup.py", "--quiet", "build_ext"]
    environment = {**os.environ, "NIRVANA_CUDA": "1", "PATH": str(tmp_path)}
    process = subprocess.run(command, cwd=checkout, capture_output=True, text=True, env=environment, check=False)
    assert process.returncode != 0
    assert process.stderr.strip() == "nirvana: NIRVANA_CUDA=1, but no nvcc with libcudart_static.a is on PATH"
