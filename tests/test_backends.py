"""The choice of backend, what is said where one is missing, and what equals what between them."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch
from operators import DTYPES, SERVED, draw, draw_bits, equal_bits, short

from nirvana import NirvanaError, ops
from nirvana.ops import STATISTICS, backends, gather_slice, group_saliency, kl_divergence, use_backend
from nirvana.ops.backends.upload import upload

pytest_plugins = ("operators",)
pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
BUILT = ops.status()["cpu"] is None


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch):
    """Each test starts as a process does, whatever the environment of the test run forces."""
    monkeypatch.delenv("NIRVANA_BACKEND", raising=False)
    monkeypatch.setattr(backends, "_forced", "auto")
    monkeypatch.setattr(backends, "_automatic", {})


def chosen(device: torch.device = CPU) -> str:
    """Name of the backend that serves tensors on `device` now."""
    module = backends.choose(device).__name__.rpartition(".")[2]
    return next(name for name, backend in backends.BACKENDS.items() if backend.module == module)


def one_line(error: pytest.ExceptionInfo[NirvanaError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert message == message.strip()
    return message


def make_available(monkeypatch, name: str, reason: str | None = None) -> None:
    monkeypatch.setitem(backends.BACKENDS, name, backends.BACKENDS[name]._replace(why_not=lambda: reason))


def native(interface: object) -> types.ModuleType:
    module = types.ModuleType("nirvana._cpu")
    module.INTERFACE = interface
    return module


class Refuses:
    """An import hook under which a module is missing, or fails with an error."""

    def __init__(self, name: str, error: Exception):
        self.name, self.error = name, error

    def find_spec(self, name, path=None, target=None):
        if name == self.name:
            raise self.error


# What is there.


@pytest.mark.skipif(os.environ.get("NIRVANA_WITHOUT_CPU_KERNELS") == "1", reason="NIRVANA_WITHOUT_CPU_KERNELS=1")
def test_the_cpu_kernels_are_built():
    """They always are where there is a compiler; set NIRVANA_WITHOUT_CPU_KERNELS=1 to test without them."""
    assert ops.status()["cpu"] is None


def test_status_names_every_backend_with_a_reason_of_one_line():
    status = ops.status()
    assert list(status) == ["torch", "cpu", "triton", "cuda"]
    assert status["torch"] is None
    for reason in status.values():
        assert reason is None or (reason and "\n" not in reason)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_backends_are_not_available_without_a_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    status = ops.status()
    assert "triton" in status["triton"] or "needs an NVIDIA GPU" in status["triton"]
    assert "install nirvana again with nvcc" in status["cuda"] or "needs an NVIDIA GPU" in status["cuda"]
    for name in ("triton", "cuda"):
        with pytest.raises(NirvanaError, match=f"backend '{name}' is not available: ") as error:
            use_backend(name)
        assert status[name] in one_line(error)


def test_triton_that_is_not_installed_is_told(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "triton" else find(name, *a))
    assert ops.status()["triton"] == "triton is not installed: pip install triton"


def test_a_missing_module_is_told(monkeypatch):
    monkeypatch.delitem(sys.modules, "nirvana._cpu", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Refuses("nirvana._cpu", ModuleNotFoundError("none")), *sys.meta_path])
    assert ops.status()["cpu"] == "not built: install nirvana again with a C++ compiler (g++ or clang++)"
    with pytest.raises(NirvanaError, match="backend 'cpu' is not available: not built: install nirvana again") as error:
        use_backend("cpu")
    one_line(error)
    assert chosen() == "torch"


def test_a_module_that_does_not_load_is_told(monkeypatch):
    monkeypatch.delitem(sys.modules, "nirvana._cpu", raising=False)
    broken = ImportError("libstdc++.so.6: version `GLIBCXX_3.4.32' not found")
    monkeypatch.setattr(sys, "meta_path", [Refuses("nirvana._cpu", broken), *sys.meta_path])
    reason = ops.status()["cpu"]
    assert "cannot be loaded" in reason
    assert "GLIBCXX_3.4.32" in reason
    assert "install nirvana again" in reason
    assert chosen() == "torch"


@pytest.mark.parametrize("interface", [backends.NATIVE_INTERFACE - 1, backends.NATIVE_INTERFACE + 1])
def test_a_module_of_another_version_is_refused(monkeypatch, interface):
    monkeypatch.setitem(sys.modules, "nirvana._cpu", native(interface))
    reason = ops.status()["cpu"]
    assert reason.startswith("built from another version of nirvana: install nirvana again")
    with pytest.raises(NirvanaError, match="built from another version"):
        use_backend("cpu")
    assert chosen() == "torch"


def test_a_module_without_a_version_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "nirvana._cpu", types.ModuleType("nirvana._cpu"))
    assert "built from another version" in ops.status()["cpu"]


def test_the_built_module_is_of_this_version():
    if not BUILT:
        pytest.skip("not built")
    assert importlib.import_module("nirvana._cpu").INTERFACE == backends.NATIVE_INTERFACE


# Which one serves.


def test_auto_takes_kernels_before_the_reference(monkeypatch):
    assert chosen() == ("cpu" if BUILT else "torch")
    assert chosen(torch.device("meta")) == "torch"
    monkeypatch.setattr(backends, "_automatic", {})
    make_available(monkeypatch, "cpu", "not built")
    assert chosen() == "torch"
    assert chosen() == "torch"


def test_auto_never_takes_cuda_of_itself(monkeypatch):
    """C++ for the GPU serves on request only."""
    for name in ("triton", "cuda"):
        make_available(monkeypatch, name, "not today")
    make_available(monkeypatch, "cuda")
    assert chosen(torch.device("cuda")) == "torch"


def test_every_choice_names_a_backend():
    assert all(name in backends.BACKENDS for names in backends.PREFERENCE.values() for name in names)
    assert all(names[-1] == "torch" for names in backends.PREFERENCE.values())


@pytest.mark.parametrize("served", SERVED, ids=map("-".join, SERVED), indirect=True)
def test_a_forced_backend_serves(served):
    assert chosen(torch.device(served.device)) == served.backend
    with use_backend("torch"):
        assert chosen(torch.device(served.device)) == "torch"
    assert chosen(torch.device(served.device)) == served.backend


def test_use_backend_as_a_call_lasts():
    use_backend("torch")
    assert chosen() == "torch"
    use_backend("auto")
    assert chosen() == ("cpu" if BUILT else "torch")


def test_use_backend_as_a_context_ends(monkeypatch):
    make_available(monkeypatch, "cpu")
    monkeypatch.setitem(sys.modules, "nirvana.ops.backends.cpu", types.ModuleType("nirvana.ops.backends.cpu"))
    monkeypatch.setattr(backends, "_automatic", {"cpu": "automatic"})
    with use_backend("torch"):
        assert chosen() == "torch"
        with use_backend("cpu"):
            assert chosen() == "cpu"
            with use_backend("auto"):
                assert backends.choose(CPU) == "automatic"
            assert chosen() == "cpu"
        assert chosen() == "torch"
        with pytest.raises(KeyError), use_backend("cpu"):
            raise KeyError
        assert chosen() == "torch"
    assert backends.choose(CPU) == "automatic"


def test_a_refused_backend_changes_nothing(monkeypatch):
    make_available(monkeypatch, "cpu", "not built")
    use_backend("torch")
    for name in ("cpu", "gpu"):
        with pytest.raises(NirvanaError):
            use_backend(name)
        assert chosen() == "torch"
        with pytest.raises(NirvanaError), use_backend(name):
            pass
        assert chosen() == "torch"


@pytest.mark.parametrize("name", ["gpu", "CPU", "", "reference", "torch "])
def test_an_unknown_backend_is_refused(name):
    with pytest.raises(NirvanaError) as error:
        use_backend(name)
    assert one_line(error) == f"backend {name!r} must be one of auto, torch, cpu, triton, cuda"


def test_a_backend_that_does_not_serve_the_device_is_refused(monkeypatch):
    make_available(monkeypatch, "cuda")
    weight = torch.ones(2, 3)
    with use_backend("cuda"):
        for call in (
            lambda: group_saliency(weight, weight, axis=0, group=1),
            lambda: gather_slice(weight, [0], axis=0),
            lambda: kl_divergence(weight, weight),
        ):
            with pytest.raises(NirvanaError) as error:
                call()
            assert one_line(error).startswith("backend 'cuda' serves tensors on cuda, not on cpu; ")
    make_available(monkeypatch, "cpu")
    with use_backend("cpu"), pytest.raises(NirvanaError, match="backend 'cpu' serves tensors on cpu, not on cuda"):
        backends.choose(torch.device("cuda"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    make_available(monkeypatch, "triton")
    with use_backend("triton"), pytest.raises(NirvanaError, match="backend 'triton' serves tensors on cuda"):
        backends.choose(CPU)


# The environment.


def test_the_environment_forces_a_backend(monkeypatch):
    monkeypatch.setenv("NIRVANA_BACKEND", "torch")
    assert chosen() == "torch"
    monkeypatch.setenv("NIRVANA_BACKEND", "auto")
    assert chosen() == ("cpu" if BUILT else "torch")


def test_a_call_outranks_the_environment(monkeypatch):
    monkeypatch.setenv("NIRVANA_BACKEND", "no such backend")
    with use_backend("torch"):
        assert chosen() == "torch"
    # "auto" by a call is no choice: the environment stays in force.
    with use_backend("auto"), pytest.raises(NirvanaError):
        chosen()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpu", "NIRVANA_BACKEND 'gpu' must be one of auto, torch, cpu, triton, cuda"),
        ("cuda", "NIRVANA_BACKEND 'cuda' is not available: not built: install nirvana again with nvcc"),
    ],
)
def test_the_environment_may_be_wrong(monkeypatch, name, message):
    make_available(monkeypatch, "cuda", "not built: install nirvana again with nvcc")
    monkeypatch.setenv("NIRVANA_BACKEND", name)
    with pytest.raises(NirvanaError) as error:
        group_saliency(torch.ones(2, 3), torch.ones(2, 3), axis=0, group=1)
    assert one_line(error) == message


# CUDA graphs.


def test_a_table_is_not_uploaded_while_a_graph_is_captured(monkeypatch):
    """Its copy would be repeated from memory that is no longer ours. A plan uploads before, one tensor has no table."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(NirvanaError) as error:
        upload([1, 2, 3], torch.device("cuda", 0))
    assert one_line(error).startswith("a table of 3 numbers cannot be uploaded while a CUDA graph is captured: ")
    assert "nirvana.ops.plan_group_saliency" in str(error.value)


# Between processes.

REPORT = textwrap.dedent(
    """
    import hashlib, sys, torch
    from nirvana import ops
    torch.set_num_threads(int(sys.argv[1]))
    weight = torch.randn((1025, 513), generator=torch.Generator().manual_seed(0))
    grad = torch.randn((1025, 513), generator=torch.Generator().manual_seed(1)).bfloat16()
    for backend in sys.argv[2:]:
        digest = hashlib.sha256()
        with ops.use_backend(backend):
            for axis in (0, 1):
                sums = ops.group_saliency(weight, grad, axis=axis, group=1, statistics=list(ops.STATISTICS))
                digest.update(sums.numpy().tobytes())
            digest.update(ops.kl_divergence(weight, grad).numpy().tobytes())
            digest.update(torch.ops.nirvana.kl_divergence_state(weight, grad).numpy().tobytes())
            digest.update(ops.gather_slice(weight, [5, 1, 2], axis=1, unit=3).numpy().tobytes())
        print(backend, digest.hexdigest())
    """
)


def run(script: str, *arguments: object, **environment: str) -> str:
    folder = Path(ops.__file__).parents[2]
    process = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, **environment},
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_another_process_computes_the_same_bits(capsys, restored_threads):
    names = [pair.backend for pair in SERVED if pair.device == "cpu" and pair.backend != "triton"]
    arguments, sys.argv = sys.argv, ["", "1", *names]
    try:
        exec(REPORT, {"hashlib": hashlib})
    finally:
        sys.argv = arguments
    here = capsys.readouterr().out
    assert len(here.splitlines()) == len(names)
    assert run(REPORT, 3, *names) == here


def test_without_the_module_everything_works_by_the_reference():
    script = textwrap.dedent(
        """
        import sys
        class Blocks:
            def find_spec(self, name, path=None, target=None):
                if name == "nirvana._cpu":
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        sys.meta_path.insert(0, Blocks())
        import os, torch
        from nirvana import NirvanaError, ops
        print(ops.status()["cpu"])
        weight = torch.arange(12.0).view(3, 4)
        ours = [ops.group_saliency(weight, weight, axis=0, group=1), ops.gather_slice(weight, [2], axis=0)]
        ours.append(ops.kl_divergence(weight, weight))
        print([result.tolist() for result in ours])
        for variable in ("cpu", "nonsense"):
            os.environ["NIRVANA_BACKEND"] = variable
            try:
                ops.kl_divergence(weight, weight)
            except NirvanaError as error:
                print(error)
        """
    )
    assert run(script, NIRVANA_BACKEND="auto").splitlines() == [
        "not built: install nirvana again with a C++ compiler (g++ or clang++)",
        "[[14.0, 126.0, 366.0], [[8.0, 9.0, 10.0, 11.0]], [0.0, 0.0, 0.0]]",
        "NIRVANA_BACKEND 'cpu' is not available: not built: install nirvana again with a C++ compiler (g++ or clang++)",
        "NIRVANA_BACKEND 'nonsense' must be one of auto, torch, cpu, triton, cuda",
    ]


# What backends have in common.

WITH_KERNELS = pytest.mark.skipif(not BUILT, reason="the cpu backend is not built")


@pytest.mark.parametrize(
    "served", [pair for pair in SERVED if pair.backend != "torch"] or SERVED, ids="-".join, indirect=True
)
@pytest.mark.parametrize("types", [(torch.float32, torch.float32), (torch.bfloat16, torch.float16)], ids=short)
def test_sums_of_backends_differ_by_rounding_alone(served, types):
    weight, grad = draw((40, 77), types[0], served.device, 0), draw((40, 77), types[1], served.device, 1)
    for axis in (0, 1):
        ours = group_saliency(weight, grad, axis=axis, group=1, statistics=list(STATISTICS))
        with use_backend("torch"):
            expected = group_saliency(weight, grad, axis=axis, group=1, statistics=list(STATISTICS))
            size = group_saliency(weight, grad, axis=axis, group=1)
        bound = 5e-7 * expected
        bound[1] = 5e-7 * size
        assert ((ours - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8, torch.complex128], ids=short)
def test_slices_of_backends_are_equal(dtype):
    weight = draw_bits((24, 30), dtype, "cpu", 2)
    results = []
    for device, backend in SERVED:
        with use_backend(backend):
            results.append(gather_slice(weight.to(device), [3, 0, 1], axis=1, unit=5).cpu())
    assert all(equal_bits(results[0], other) for other in results[1:])


#: Every third column and every fifth: runs of one, in words of sixteen columns that are kept in part.
ODD = [column for column in range(519) if not column % 3 or not column % 5]


@WITH_KERNELS
@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_every_instruction_set_gives_the_same_bits(dtype):
    """Wider registers, same order of the same operations: a plan does not depend on the machine."""
    cpu = importlib.import_module("nirvana._cpu")
    best = cpu.level()
    weight, grad = draw_bits((133, 519), dtype, "cpu", 3), draw_bits((519, 133), dtype, "cpu", 4).T.contiguous()
    # Any bits but NaN (whose payload is nobody's promise) and infinity, small enough to be summed.
    weight, grad = (torch.where(x.abs() < 1e4, x, x.exp().isnan().to(dtype)).nan_to_num() for x in (weight, grad))
    results = {}
    try:
        for level in cpu.levels():
            assert cpu.force_level(level)
            assert cpu.level() == level
            with use_backend("cpu"):
                sums = [
                    group_saliency(weight, grad, axis=axis, group=1, statistics=list(STATISTICS)) for axis in (0, 1)
                ]
                taylor = [group_saliency(weight, grad, axis=axis, group=1) for axis in (0, 1)]
                state = torch.ops.nirvana.kl_divergence_state(weight, grad)
                bits = weight.view(torch.int32 if dtype == torch.float32 else torch.int16)
                gathered = [gather_slice(bits, kept, axis=1).float() for kept in (ODD, ODD[::-1])]
                results[level] = [*sums, *taylor, *gathered, kl_divergence(weight, grad), state]
    finally:
        cpu.force_level(best)
    assert "baseline" in results
    assert all(result.isfinite().all() for result in results["baseline"])
    for level, result in results.items():
        for ours, expected in zip(result, results["baseline"], strict=True):
            assert torch.equal(ours, expected), level


@WITH_KERNELS
def test_every_instruction_set_reads_every_half():
    """All 65 536 fp16 and bf16 numbers, one a row, subnormal ones, infinity and NaN among them."""
    cpu = importlib.import_module("nirvana._cpu")
    best = cpu.level()
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    try:
        for level in cpu.levels():
            cpu.force_level(level)
            for dtype in (torch.float16, torch.bfloat16):
                weight = bits.view(dtype)
                with use_backend("cpu"):
                    by_columns = group_saliency(weight[None], None, axis=1, group=1, statistics="magnitude")
                    by_rows = group_saliency(weight[:, None], None, axis=0, group=1, statistics="magnitude")
                for ours in (by_columns, by_rows):
                    torch.testing.assert_close(ours, weight.float().abs(), rtol=0, atol=0, equal_nan=True)
    finally:
        cpu.force_level(best)


@WITH_KERNELS
def test_an_unknown_instruction_set_is_not_forced():
    cpu = importlib.import_module("nirvana._cpu")
    best = cpu.level()
    assert not cpu.force_level("avx1024")
    assert cpu.level() == best
