"""Maps the folders to packages and builds the native modules. Everything else stands in pyproject.toml.

The folders kernels/ and benchmarks/ have no __init__.py and are installed as nirvana.kernels and nirvana.benchmarks: a
top-level module `kernels` belongs to another distribution, which transformers imports. The links nirvana/kernels and
nirvana/benchmarks make them importable from a checkout and from an editable install, whose finder does not look into
packages for folders without __init__.py.

Native modules (csrc/) are plain pybind11 without torch headers, built by ninja. NIRVANA_CUDA=auto|0|1 says whether
nirvana._cuda is built (auto: where nvcc is found), NIRVANA_CUDA_ARCHS for which GPUs ("80 90"), NIRVANA_SANITIZE with
which sanitizers nirvana._cpu is built ("address,undefined"). Where a module cannot be built the install goes on without
it, and `nirvana info` says so; NIRVANA_CUDA=1 makes its module a must.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
# No -march=native: the wheel must run elsewhere. Products are never fused into sums (-ffp-contract=off), so that all
# levels give the same bits.
CXX_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -pthread -Wall -Wextra -Wno-psabi"
# The sources in csrc/cpu/simd are compiled once for each level; csrc/cpu/levels.cpp chooses at run time, and must ask
# the processor for just these features.
LEVELS = {"baseline": ""}
SANITIZERS = os.environ.get("NIRVANA_SANITIZE")
if platform.machine().lower() in ("x86_64", "amd64"):
    if SANITIZERS:
        # One level, of the machine that tests: the source is the same, and the compiler needs minutes for each.
        LEVELS = {"baseline": "-mavx2 -mf16c"}
    else:
        LEVELS |= {"avx2": "-mavx2 -mf16c", "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl"}
        CXX_FLAGS += " -DNIRVANA_X86_LEVELS"
NVCC_FLAGS = "-std=c++17 -O3 -fmad=false -Xcompiler -fPIC,-fvisibility=hidden"
CUDA_ARCHS = "80 90"


class CannotBuildError(Exception):
    """One line: what is missing or went wrong, and what to do."""


class NinjaBuild(build_ext):
    """Compiles each extension with ninja: all sources side by side, and again only what has changed."""

    def build_extension(self, extension):
        try:
            self._build(extension)
        except CannotBuildError as error:
            if not extension.optional:
                raise SystemExit(f"nirvana: {extension.name} was not built: {error}") from None
            print(f"nirvana: {extension.name} was not built, the install goes on without it: {error}", file=sys.stderr)

    def _build(self, extension):
        folder = Path(self.build_temp).absolute() / extension.name
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(extension.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / "build.ninja").write_text(_ninja_file(extension, target))
        run = subprocess.run([_ninja(), "-C", folder], capture_output=True, text=True)
        if run.returncode:
            # The compiler's own words, for whoever runs pip with -v; ninja prints them on stdout.
            print(run.stdout, run.stderr, sep="\n", file=sys.stderr)
            raise CannotBuildError("the compiler failed; pip install -v shows its output")


def _ninja_file(extension, target):
    cxx = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), None)
    if cxx is None or shutil.which(shlex.split(cxx)[0]) is None:
        raise CannotBuildError(
            f"no C++ compiler ({cxx or 'g++ or clang++'}) is on PATH; install one, then install again"
        )
    try:
        import pybind11
    except ImportError:
        raise CannotBuildError("pybind11 is missing; pip install pybind11, or leave --no-build-isolation out") from None
    includes = [sysconfig.get_path("include"), pybind11.get_include(), *extension.include_dirs]
    flags = " ".join([CXX_FLAGS, *(f"-I{_escaped(path)}" for path in includes), *extension.extra_compile_args])
    link_flags = " ".join(["-pthread", *extension.extra_link_args])
    if sys.platform == "darwin":
        link_flags += " -undefined dynamic_lookup"
    else:
        link_flags += " -Wl,--strip-all"
    if SANITIZERS:
        # All findings are fatal; frame pointers and lines make the reports readable.
        flags += f" -O1 -g1 -fsanitize={SANITIZERS} -fno-sanitize-recover=all -fno-omit-frame-pointer"
        link_flags = f"-pthread -fsanitize={SANITIZERS}"
    lines = [
        "rule cxx",
        f"  command = {cxx} -MMD -MF $out.d {flags} $level -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule nvcc",
        f"  command = {shutil.which('nvcc')} -MMD -MF $out.d {NVCC_FLAGS} {_gencode()} -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {cxx} -shared $in -o $out {link_flags}",
    ]
    objects = []
    for source in extension.sources:
        rule = "nvcc" if source.endswith(".cu") else "cxx"
        levels = LEVELS if Path(source).parent.name == "simd" else {"": ""}
        for level, level_flags in levels.items():
            objects.append("-".join(filter(None, (level, Path(source).name))) + ".o")
            lines.append(f"build {objects[-1]}: {rule} {_escaped(ROOT / source)}")
            if level:
                lines.append(f"  level = -DNIRVANA_LEVEL={level} {level_flags}")
    lines += [f"build {_escaped(target)}: link {' '.join(objects)}", f"default {_escaped(target)}", ""]
    return "\n".join(lines)


def _escaped(path):
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _gencode():
    archs = os.environ.get("NIRVANA_CUDA_ARCHS", CUDA_ARCHS).replace(",", " ").replace(".", "").split()
    # Machine code for each, and PTX of the newest for GPUs to come.
    codes = [f"-gencode arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return " ".join([*codes, f"-gencode arch=compute_{archs[-1]},code=compute_{archs[-1]}"])


def _ninja():
    try:
        from ninja import BIN_DIR

        return os.path.join(BIN_DIR, "ninja")
    except ImportError:
        found = shutil.which("ninja")
    if found is None:
        raise CannotBuildError("ninja is missing; pip install ninja, or leave --no-build-isolation out")
    return found


def _cuda_library_folder():
    """Where libcudart_static.a is. nvcc may be a wrapper somewhere else, so it is asked for its toolkit."""
    dry = subprocess.run(["nvcc", "--dryrun", "-c", "x.cu"], capture_output=True, text=True).stderr
    tops = [line.split("TOP=", 1)[1].strip() for line in dry.splitlines() if "TOP=" in line]
    for top in tops:
        for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
            if os.path.exists(f"{top}/{folder}/libcudart_static.a"):
                return os.path.normpath(f"{top}/{folder}")
    return None


def _extension(name, folder, **arguments):
    sources = sorted(str(p.relative_to(ROOT)) for p in (ROOT / folder).rglob("*") if p.suffix in (".cpp", ".cu"))
    return Extension(name, sources, include_dirs=[str(ROOT / folder)], **arguments)


def _extensions():
    extensions = [_extension("nirvana._cpu", "csrc/cpu", optional=True)]
    wish = os.environ.get("NIRVANA_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"nirvana: NIRVANA_CUDA={wish} must be auto, 0 or 1")
    if wish == "0":
        return extensions
    library = _cuda_library_folder() if shutil.which("nvcc") else None
    if library is None:
        if wish == "1":
            raise SystemExit("nirvana: NIRVANA_CUDA=1, but no nvcc with libcudart_static.a is on PATH")
        return extensions
    link = [f"-L{_escaped(library)}", "-lcudart_static", "-ldl", "-lrt"]
    extensions.append(_extension("nirvana._cuda", "csrc/cuda", optional=wish == "auto", extra_link_args=link))
    return extensions


setup(
    packages=[*find_packages(include=["nirvana", "nirvana.*"]), "nirvana.kernels", "nirvana.benchmarks"],
    package_dir={"nirvana": "nirvana", "nirvana.kernels": "kernels", "nirvana.benchmarks": "benchmarks"},
    ext_modules=_extensions(),
    cmdclass={"build_ext": NinjaBuild},
)
