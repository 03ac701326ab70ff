"""The CUDA kernels without a GPU: csrc/cuda compiled by g++ against tests/cuda_emulation, run block by block.

This proves indexing and arithmetic of host and device code: sizes, strides, alignment (a misaligned 128-bit load
aborts, as it would on a GPU), what lies beyond the ends, bits that depend on nothing but values. It proves neither
the absence of races (though opposite orders of threads must agree) nor speed; e^x is libm's, not the GPU's.
"""

from __future__ import annotations

import ctypes
import faulthandler
import importlib.util
import itertools
import math
import mmap
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import nirvana
from nirvana.errors import NirvanaError
from nirvana.ops.backends import NATIVE_INTERFACE, Matrices, reference
from nirvana.ops.divergence import finish, merge
from nirvana.ops.saliency import STATISTICS

pybind11 = pytest.importorskip("pybind11")
if shutil.which("g++") is None or sys.platform != "linux":
    pytest.skip("needs g++ on Linux", allow_module_level=True)

ROOT = Path(__file__).parent.parent
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALL = sum(STATISTICS.values())
INF, NAN = math.inf, math.nan
FLAGS = "-std=c++17 -O1 -fPIC -ffp-contract=off -Wall -Wextra -Werror -Wno-unknown-pragmas"
SANITIZE = "-fsanitize=undefined -fno-sanitize-recover=all"
VOCABULARIES = [1, 7, 8, 2047, 2055, 9001]


@pytest.fixture(scope="session")
def native(tmp_path_factory):
    """The module nirvana._cuda, emulated."""
    folder = tmp_path_factory.mktemp("cuda")
    includes = [f"-I{path}" for path in (ROOT / "tests/cuda_emulation", ROOT / "csrc/cuda")]
    objects, running = [], []
    for source in [*(ROOT / "csrc/cuda").glob("*.cu"), ROOT / "csrc/cuda/module.cpp"]:
        objects.append(folder / f"{source.stem}.o")
        extra = [f"-I{sysconfig.get_path('include')}", f"-I{pybind11.get_include()}", "-O0"]
        flags = [*FLAGS.split(), *(SANITIZE.split() if source.suffix == ".cu" else extra)]
        command = ["g++", *flags, *includes, "-x", "c++", "-c", source, "-o", objects[-1]]
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        if len(running) % 2 == 0:
            running[-2].wait()
    for process in running:
        assert process.communicate()[1] == ""
    library = folder / "_cuda.so"
    subprocess.run(["g++", "-shared", "-fsanitize=undefined", *objects, "-o", library], check=True)
    # Not by its real name: pybind11 hands out the module that it has under a name, from whatever file it came.
    spec = importlib.util.spec_from_file_location("cuda_emulation._cuda", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def backend(native):
    """The module nirvana.ops.backends.cuda on top of it, loaded under another name: the real one stays as it is."""
    before, had = sys.modules.get("nirvana._cuda"), getattr(nirvana, "_cuda", None)
    sys.modules["nirvana._cuda"] = nirvana._cuda = native
    try:
        path = ROOT / "nirvana/ops/backends/cuda.py"
        spec = importlib.util.spec_from_file_location("emulated_cuda_backend", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.modules.pop("nirvana._cuda")
        del nirvana._cuda
        if before is not None:
            sys.modules["nirvana._cuda"] = before
        if had is not None:
            nirvana._cuda = had
    module._queue = lambda device: (0, 0)
    return module


@pytest.fixture(autouse=True)
def _poison(monkeypatch):
    """Workspaces hold NaN before a kernel writes them."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(NAN))


def draw(shape, dtype, seed, *, aligned=True):
    """Normal numbers in a matrix whose rows lie apart; a 128-bit load of it is possible or is not."""
    rows, columns = shape
    generator = torch.Generator().manual_seed(seed)
    pad = -columns % 8 + 8 if aligned else 3 - columns % 2
    wide = torch.full((rows, columns + pad), NAN, dtype=dtype)
    matrix = wide[:, :columns] if aligned else wide[:, 1 : columns + 1]
    return matrix.copy_(torch.randn(shape, generator=generator))


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def names(mask):
    return [name for name, bit in STATISTICS.items() if mask & bit]


def sums(backend, weight, grad, axis, group, mask):
    """fp32 [statistics, units], between NaN that must stay."""
    units, count = weight.shape[axis] // group, mask.bit_count()
    memory = torch.full((count * units + 2,), NAN)
    out = memory[1:-1].view(count, units).zero_()
    backend.saliency([Matrices(weight, grad, axis, group, out)], mask)
    assert memory[[0, -1]].isnan().all()
    return out


def assert_sums(ours, weight, grad, axis, group, mask):
    terms = {
        "taylor": lambda w, g: (g * w).abs(),
        "signed": lambda w, g: g * w,
        "ntk": lambda w, g: g.abs(),
        "fisher": lambda w, g: (g * w) ** 2,
        "magnitude": lambda w, g: w.abs(),
        "squared": lambda w, g: w**2,
    }
    weight, grad = weight.double(), None if grad is None else grad.double()
    for name, row in zip(names(mask), ours, strict=True):
        term = terms[name](weight, grad)
        exact = term.sum(1 - axis).view(-1, group).sum(1)
        size = term.abs().sum(1 - axis).view(-1, group).sum(1)
        assert ((row - exact).abs() <= 1e-6 * size).all(), name


def test_python_and_kernels_agree(native, backend):
    assert native.INTERFACE == NATIVE_INTERFACE
    assert native.TILES == backend.TILES
    assert native.FOLDS == backend.FOLDS


def test_errors_are_reported_with_the_words_of_cuda(native):
    matrix = torch.zeros(8, 8)
    address = matrix.data_ptr()
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        native.divergence(address, 32, 0, address, 32, 0, 8, 8, address, 0, 0, 7, 0)
    with pytest.raises(RuntimeError, match="words"):
        native.divergence(address, 0, 0, address, 0, 0, 1, 2**31, address, 0, 0, 0, 0)


SHAPES = [
    (1, 1, 0, 1),
    (1, 1, 1, 1),
    (9, 5, 0, 3),
    (9, 8, 1, 4),
    (10, 2055, 0, 2),
    (3, 4104, 0, 1),
    (33, 300, 0, 33),
    (129, 265, 1, 1),
    (131, 250, 1, 50),
    (1200, 6, 1, 3),
]


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize(("rows", "columns", "axis", "group"), SHAPES)
@pytest.mark.parametrize("types", itertools.product(DTYPES, DTYPES), ids=lambda t: "-".join(str(x)[6:] for x in t))
def test_saliency(backend, rows, columns, axis, group, types, aligned):
    weight = draw((rows, columns), types[0], 0, aligned=aligned)
    grad = draw((rows, columns), types[1], 1, aligned=aligned)
    for mask in (1, ALL):
        ours = sums(backend, weight, grad, axis, group, mask)
        assert_sums(ours, weight, grad, axis, group, mask)
        # Bits depend on values alone, not on where they lie nor on the type that they are read from.
        other = draw((rows, columns), types[0], 0, aligned=not aligned)
        assert torch.equal(ours, sums(backend, other, grad, axis, group, mask))
        assert torch.equal(ours, sums(backend, weight.float(), grad.float(), axis, group, mask))


@pytest.mark.parametrize(("shape", "axis", "group"), [((20, 70), 0, 5), ((70, 20), 1, 5)])
def test_every_set_of_statistics(backend, shape, axis, group):
    weight, grad = draw(shape, torch.bfloat16, 2), draw(shape, torch.float32, 3)
    everything = dict(zip(names(ALL), sums(backend, weight, grad, axis, group, ALL), strict=True))
    for mask in range(1, ALL + 1):
        needs_grad = mask & ~(STATISTICS["magnitude"] | STATISTICS["squared"])
        ours = sums(backend, weight, grad if needs_grad else None, axis, group, mask)
        for name, row in zip(names(mask), ours, strict=True):
            assert torch.equal(row, everything[name]), (mask, name)


@pytest.mark.parametrize("axis", [0, 1])
def test_what_no_statistic_asks_for_does_not_matter(backend, axis):
    matrix, nothing = draw((20, 30), torch.float16, 4), torch.full((20, 30), NAN)
    for mask in (STATISTICS["magnitude"], STATISTICS["squared"]):
        assert_sums(sums(backend, matrix, nothing, axis, 1, mask), matrix, None, axis, 1, mask)
    ours = sums(backend, nothing, matrix, axis, 1, STATISTICS["ntk"])
    assert_sums(ours, matrix, matrix, axis, 1, STATISTICS["ntk"])


@pytest.mark.parametrize("mask", [1, 3, ALL])
def test_one_table_has_the_bits_of_single_calls(backend, mask):
    """A layer and a half: outputs of their own, and shared ones that are added in the order of the table."""
    count = mask.bit_count()
    generator = torch.Generator().manual_seed(5)
    start = {n: torch.randn(count, n, generator=generator) * 100 for n in (24, 4, 7, 300)}
    cases = [
        ((24, 40), 0, 1, 24, torch.bfloat16),
        ((40, 24), 1, 1, 24, torch.bfloat16),
        ((160, 2100), 0, 40, 4, torch.float16),
        ((24, 40), 0, 1, 24, torch.float32),
        ((130, 512), 1, 128, 4, torch.float32),
        ((7, 9), 0, 1, 7, torch.bfloat16),
        ((1, 300), 1, 1, 300, torch.float32),
        ((300, 17), 0, 1, 300, torch.float16),
    ]
    entries = []
    for seed, (shape, axis, group, key, dtype) in enumerate(cases):
        weight, grad = draw(shape, dtype, 10 + seed), draw(shape, torch.float32, 30 + seed, aligned=bool(seed % 3))
        entries.append((weight, grad, axis, group, key))
    single = {key: out.clone() for key, out in start.items()}
    for weight, grad, axis, group, key in entries:
        backend.saliency([Matrices(weight, grad, axis, group, single[key])], mask)
    grouped = {key: out.clone() for key, out in start.items()}
    table = [Matrices(*entry[:4], grouped[entry[4]]) for entry in entries]
    assert len(backend._independent(table)) == 1
    backend.saliency(table, mask)
    for key in start:
        assert torch.equal(single[key], grouped[key])


def test_a_refused_upload_leaves_a_plan_as_it_was(backend, monkeypatch):
    """While a graph is captured gradients of another alignment need another table."""
    weight, grad = draw((24, 40), torch.float32, 90), draw((24, 40), torch.float32, 91)
    other = draw((24, 40), torch.float32, 92, aligned=False)
    outs = [torch.zeros(1, 24) for _ in range(2)]
    plan = backend.plan_saliency([Matrices(weight, grad, 0, 1, out) for out in outs], 1)

    def refuse(values, device):
        raise NirvanaError("captured")

    with monkeypatch.context() as patch:
        patch.setattr(backend, "upload", refuse)
        with pytest.raises(NirvanaError):
            plan([other, other])
    expected = torch.zeros(1, 24)
    for given, read in ((None, grad), ([other, other], other)):
        plan(given)
        backend.saliency([Matrices(weight, read, 0, 1, expected)], 1)
        assert all(torch.equal(out, expected) for out in outs)


@pytest.mark.parametrize("count", [1, 5])
def test_a_plan_reads_its_tensors_anew_and_takes_other_gradients(backend, count):
    shapes = [((24, 40), 0, 1), ((160, 2100), 0, 40), ((130, 512), 1, 128), ((7, 9), 1, 3), ((24, 64), 0, 8)][:count]
    weights = [draw(shape, torch.bfloat16, 50 + seed) for seed, (shape, *_) in enumerate(shapes)]
    grads = [draw(shape, torch.float32, 60 + seed) for seed, (shape, *_) in enumerate(shapes)]
    units = [shape[axis] // group for shape, axis, group in shapes]
    ours, single = ([torch.zeros(1, n) for n in units] for _ in range(2))
    plan = backend.plan_saliency(
        [Matrices(w, g, *rest, out) for w, g, (_, *rest), out in zip(weights, grads, shapes, ours, strict=True)], 1
    )
    # The same gradients, others, others that no 128-bit load reads, and those once more.
    others = [draw(shape, torch.float32, 70 + seed) for seed, (shape, *_) in enumerate(shapes)]
    unaligned = [draw(shape, torch.float32, 80 + seed, aligned=False) for seed, (shape, *_) in enumerate(shapes)]
    for given, read in ((None, grads), (others, others), (unaligned, unaligned), (None, unaligned), (grads, grads)):
        plan(given)
        for weight, grad, (_, axis, group), out in zip(weights, read, shapes, single, strict=True):
            backend.saliency([Matrices(weight, grad, axis, group, out)], 1)
        assert all(torch.equal(one, other) for one, other in zip(ours, single, strict=True))
        weights[0].mul_(-1.5)


@pytest.mark.parametrize(("axis", "group"), [(axis, group) for axis in (0, 1) for group in (2, 4, 8, 24, 32, 96, 480)])
def test_units_of_several_rows_or_columns_are_folded(backend, axis, group):
    """In the first launch, as far as a tile holds them: fewer partial sums, no more error."""
    shape = (480, 2100) if axis == 0 else (300, 480)
    weight, grad = draw(shape, torch.bfloat16, 21), draw(shape, torch.float32, 22)
    assert_sums(sums(backend, weight, grad, axis, group, ALL), weight, grad, axis, group, ALL)
    out = torch.zeros(1, 480 // group)
    few, many = (backend.build_table([Matrices(weight, grad, axis, g, out)], 1).workspace for g in (group, 1))
    assert many == few * min(group & -group, (8, 32)[axis])


def test_outputs_that_overlap_are_added_one_after_the_other(backend):
    memory = torch.zeros(12)
    weight, grad = draw((8, 16), torch.float32, 6), draw((8, 16), torch.float32, 7)
    table = [Matrices(weight, grad, 0, 1, memory[None, :8]), Matrices(weight, grad, 0, 1, memory[None, 4:])]
    backend.saliency(table, 1)
    exact = (weight.double() * grad.double()).abs().sum(1)
    expected = torch.zeros(12, dtype=torch.float64)
    expected[:8] += exact
    expected[4:] += exact
    torch.testing.assert_close(memory.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("axis", [0, 1])
def test_infinite_and_undefined_numbers_reach_their_unit_alone(backend, axis):
    weight, grad = draw((200, 300), torch.bfloat16, 8), draw((200, 300), torch.bfloat16, 9)
    weight[5, 7], weight[150, 290] = NAN, INF
    ours = sums(backend, weight, grad, axis, 1, 1)[0]
    touched = ((5, 150), (7, 290))[axis]
    assert ours[touched[0]].isnan()
    assert ours[touched[1]] == INF
    assert ours.isfinite().sum() == len(ours) - 2


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64, torch.complex128], ids=lambda t: str(t)[6:]
)
@pytest.mark.parametrize(("shape", "axis", "unit"), [((12, 9), 0, 3), ((70, 600), 0, 1), ((31, 320), 1, 1),
                                                     ((40, 528), 1, 16), ((1, 35), 1, 7)])  # fmt: skip
def test_gather(backend, shape, axis, unit, dtype, aligned):
    generator = torch.Generator().manual_seed(10)
    size = torch.zeros((), dtype=dtype).element_size()
    units = shape[axis] // unit
    kept = torch.randperm(units, generator=generator)[: max(1, units * 2 // 3)]
    index = (kept[:, None] * unit + torch.arange(unit)).flatten()
    weights, outs, memories = [], [], []
    for extra in (0, 3):  # two matrices that differ along the other axis
        rows, columns = (shape[0], shape[1] + extra) if axis == 0 else (shape[0] + extra, shape[1])
        pad = -columns % 16 if aligned else 1
        raw = torch.randint(0, 256, (rows, (columns + pad) * size), generator=generator, dtype=torch.uint8)
        weights.append(raw.view(dtype)[:, :columns] if aligned else raw.view(dtype)[:, 1:])
        result = [rows, columns]
        result[axis] = len(index)
        memory = torch.full((result[0] * result[1] * size + 32,), 165, dtype=torch.uint8)
        outs.append(memory[16:-16].view(dtype).view(result))
        memories.append(memory)
    backend.gather(weights, kept, axis, unit, outs)
    for weight, out, memory in zip(weights, outs, memories, strict=True):
        assert torch.equal(bits(out), bits(weight.index_select(axis, index)))
        assert (memory[:16] == 165).all()
        assert (memory[-16:] == 165).all()


def test_gather_of_more_matrices_than_a_launch_takes(backend):
    weights = [torch.randn(6, 4 + number) for number in range(35)]
    kept = torch.tensor([4, 0, 4])
    outs = [torch.full((3, weight.shape[1]), NAN) for weight in weights]
    backend.gather(weights, kept, 0, 1, outs)
    for weight, out in zip(weights, outs, strict=True):
        assert torch.equal(out, weight[kept])
    # Columns of two types in one call.
    weights = [torch.randn(3, 8), torch.randn(3, 8).bfloat16()]
    outs = [torch.zeros(3, 6, dtype=weight.dtype) for weight in weights]
    backend.gather(weights, kept.new_tensor([3, 1, 0]), 1, 2, outs)
    for weight, out in zip(weights, outs, strict=True):
        assert torch.equal(out, weight[:, [6, 7, 2, 3, 0, 1]])


def kl(backend, p, q):
    """fp32 [tokens], from one call; the state must say the same."""
    memory = torch.full((len(p) + 2,), NAN)
    backend.divergence(p, q, memory[1:-1])
    assert memory[[0, -1]].isnan().all()
    state = torch.full((5, len(p)), NAN, dtype=torch.float64)
    backend.divergence_state(p, q, state)
    torch.testing.assert_close(finish(state), memory[1:-1], rtol=1e-6, atol=1e-6, equal_nan=True)
    return memory[1:-1]


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("types", itertools.product(DTYPES, DTYPES), ids=lambda t: "-".join(str(x)[6:] for x in t))
def test_divergence(backend, vocabulary, types):
    p, q = draw((3, vocabulary), types[0], 11), draw((3, vocabulary), types[1], 12)
    exact = (p.double().softmax(-1) * (p.double().log_softmax(-1) - q.double().log_softmax(-1))).sum(-1)
    ours = kl(backend, p, q)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-6)
    unaligned = draw((3, vocabulary), types[0], 11, aligned=False)
    assert torch.equal(ours, kl(backend, unaligned, q))
    state, expected = torch.empty(5, 3, dtype=torch.float64), torch.empty(5, 3, dtype=torch.float64)
    backend.divergence_state(p, q, state)
    reference.divergence_state(p, q, expected)
    torch.testing.assert_close(state, expected, rtol=2e-6, atol=1e-4 * math.sqrt(vocabulary))


@pytest.mark.parametrize(
    ("p", "q", "expected"),
    [
        ([0, -INF], [0, 0], math.log(2)),
        ([0, 0], [0, -INF], INF),
        ([0, -300], [0, -INF], INF),
        ([0, -INF], [1, -INF], 0.0),
        ([-INF, 0, 0], [-INF, 0, -INF], INF),
        ([-INF, -INF], [0, 0], NAN),
        ([0, 0], [-INF, -INF], NAN),
        ([NAN, 0], [0, 0], NAN),
        ([-INF, 0], [NAN, 0], NAN),
        ([0, 0], [INF, 0], NAN),
        ([INF, 0], [0, 0], NAN),
    ],
    ids=str,
)
@pytest.mark.parametrize("before", [0, 6, 3000])
def test_excluded_words(backend, p, q, expected, before):
    """Alone, and after a run of words that both exclude: where no maximum exists yet."""
    p, q = (torch.tensor([[-INF] * before + row] * 2) for row in (p, q))
    for dtype in (torch.float32, torch.bfloat16):
        ours = kl(backend, p.to(dtype), q.to(dtype))
        assert ours.tolist() == [pytest.approx(expected, rel=1e-6, abs=1e-6, nan_ok=True)] * 2


def test_states_of_chunks_merge(backend):
    p, q = draw((4, 5000), torch.float32, 13) * 5, draw((4, 5000), torch.float32, 14) * 5
    p[0, :2000] = q[0, :2000] = -INF
    whole = kl(backend, p, q)
    state = None
    for start in range(0, 5000, 1000):
        mine = torch.empty(5, 4, dtype=torch.float64)
        backend.divergence_state(p[:, start : start + 1000], q[:, start : start + 1000], mine)
        state = mine if state is None else merge(state, mine)
    torch.testing.assert_close(finish(state), whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "parts"),
    [(1, 2048, 1), (1, 8191, 2), (1, 10_241, 3), (263, 8193, 2), (264, 8193, 1), (40, 128_256, 13), (1, 2**30, 64)],
)
def test_few_tokens_are_split(native, tokens, vocabulary, parts):
    assert native.divergence_workspace(tokens, vocabulary) == (5 * parts * tokens if parts > 1 else 0)


@pytest.mark.parametrize("tokens", [1, 2, 263, 264])
def test_divergence_of_parts(backend, tokens):
    """Three parts for one token, the last of which is short; two for 263, one for 264."""
    p, q = draw((tokens, 10_249), torch.bfloat16, 21) * 3, draw((tokens, 10_249), torch.float32, 22)
    ours = kl(backend, p, q)
    exact = (p.double().softmax(-1) * (p.double().log_softmax(-1) - q.double().log_softmax(-1))).sum(-1)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-6)
    assert torch.equal(ours, kl(backend, draw((tokens, 10_249), torch.bfloat16, 21, aligned=False) * 3, q))


def test_parts_of_which_some_are_excluded(backend):
    p, q = draw((8, 12_288), torch.float32, 23), draw((8, 12_288), torch.float32, 24)
    p[0, :4096] = q[0, :4096] = -INF
    p[1, 4096:] = -INF
    q[2, -4096:] = -INF
    q[3, 8192] = -INF
    p[4, 4095], q[5, -1] = NAN, NAN
    p[6] = -INF
    p[7, 8192], q[7, 3] = 300, -INF
    exact = torch.empty(8)
    reference.divergence(p, q, exact)
    assert exact[[2, 3, 7]].tolist() == [INF] * 3
    assert exact[4:7].isnan().all()
    torch.testing.assert_close(kl(backend, p, q), exact, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("tokens", [1, 264], ids=["parts", "whole"])
def test_long_vocabularies(backend, tokens):
    """Steps whose sums are half a unit in the last place of what stands in a thread: plain sums in fp32 lose 4e-6."""
    p = torch.full((1, 128_256), -16.7)
    p[0, :2048] = 0
    q = p + draw((1, 128_256), torch.float32, 25) * 1e-2
    exact = (p.double().softmax(-1) * (p.double().log_softmax(-1) - q.double().log_softmax(-1))).sum(-1)
    ours = torch.full((tokens,), NAN)
    # One row, as often as it takes.
    backend.divergence(p.expand(tokens, -1), q.expand(tokens, -1), ours)
    assert ((ours - exact).abs() <= 1e-7).all()


def test_numbers_near_overflow(backend):
    p, q = draw((5, 9000), torch.float32, 26), draw((5, 9000), torch.float32, 27)
    lowest = torch.finfo(torch.float32).min
    p[0, 5000:] = q[0, 5000:] = lowest
    q[1, 7:40] = lowest
    p[2], q[2] = lowest, lowest
    p[3, :3], q[3, 4] = 3e38, 3e38
    p[4] += torch.finfo(torch.bfloat16).max
    exact = (p.double().softmax(-1) * (p.double().log_softmax(-1) - q.double().log_softmax(-1))).sum(-1)
    ours = torch.full((5,), NAN)
    backend.divergence(p, q, ours)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-6)


def test_a_constant_costs_no_digits(backend):
    p, q = ((draw((3, 777), torch.float32, seed) * 256).round() / 256 for seed in (15, 16))
    torch.testing.assert_close(kl(backend, p + 1024, q - 512), kl(backend, p, q), rtol=0, atol=1e-6)


def test_bits_do_not_depend_on_the_order_of_threads(backend, monkeypatch):
    weight, grad = draw((200, 2100), torch.bfloat16, 17), draw((200, 2100), torch.bfloat16, 18)
    p, q = draw((2, 9000), torch.bfloat16, 19), draw((2, 9000), torch.bfloat16, 20)

    def everything():
        by_axis = [sums(backend, weight, grad, axis, 50, ALL) for axis in (0, 1)]
        # Three entries of one output, of which one has more lanes a unit than the others.
        shared = torch.zeros(6, 42)
        table = [Matrices(weight, grad, 1, 50, shared), Matrices(weight[:42], grad[:42], 0, 1, shared)]
        backend.saliency([*table, table[0]], ALL)
        return [*by_axis, shared, kl(backend, p, q)]

    forwards = everything()
    monkeypatch.setenv("NIRVANA_EMULATION_REVERSE", "1")
    for first, second in zip(forwards, everything(), strict=True):
        assert torch.equal(first, second)


def guarded(tensor):
    """A copy that ends where readable memory ends: the first byte beyond it, when touched, kills the process."""
    size = tensor.numel() * tensor.element_size()
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    view = torch.frombuffer(memory, dtype=tensor.dtype, offset=pages - size, count=tensor.numel())
    view.copy_(tensor.flatten())
    base = view.data_ptr() + size
    assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(base), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    return view.view(tensor.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t)[6:])
def test_nothing_beyond_the_end_is_touched(backend, dtype):
    work = []
    for rows, columns in ((3, 2056), (130, 264), (9, 13), (2, 10_000), (1, 8), (17, 1)):
        weight, grad = guarded(torch.ones(rows, columns, dtype=dtype)), guarded(torch.ones(rows, columns))
        for axis in (0, 1):
            out = guarded(torch.zeros(6, weight.shape[axis]))
            plan = backend.build_table([Matrices(weight, grad, axis, 1, out)], ALL)
            workspace = guarded(torch.zeros(plan.workspace))
            arguments = (0, plan.values, *plan[1:5], workspace.data_ptr(), ALL, 0, 0)
            work.append((backend._cuda.saliency, arguments, (workspace, out)))
            plan = backend.build_table([Matrices(weight, grad, axis, 1, out)] * 2, ALL)
            table = guarded(torch.tensor(plan.values))
            workspace = guarded(torch.zeros(plan.workspace))
            arguments = (table.data_ptr(), [], *plan[1:5], workspace.data_ptr(), ALL, 0, 0)
            work.append((backend._cuda.saliency, arguments, (table, workspace, out)))
            kept = guarded(torch.arange(weight.shape[axis]))
            copy = guarded(torch.zeros_like(weight))
            source = (weight.data_ptr(), columns * weight.element_size())
            target = (copy.data_ptr(), rows, columns * weight.element_size())
            unit = 1 if axis == 0 else weight.element_size()
            arguments = ([(*source, *target)], kept.data_ptr(), axis, unit, 0, 0)
            work.append((backend._cuda.gather, arguments, (kept, copy)))
        out = guarded(torch.zeros(rows))
        p = (weight.data_ptr(), columns * weight.element_size(), backend.TYPES[dtype])
        q = (grad.data_ptr(), columns * 4, 0)
        states = backend._cuda.divergence_workspace(rows, columns)
        workspace = guarded(torch.zeros(max(states, 1), dtype=torch.float64))
        arguments = (*p, *q, rows, columns, out.data_ptr(), 0, workspace.data_ptr(), 0, 0)
        work.append((backend._cuda.divergence, arguments, (weight, grad, out, workspace)))

    def run():
        for function, arguments, _ in work:
            function(*arguments)

    assert in_child(run) == 0
    beyond = out.data_ptr() + out.numel() * out.element_size()
    assert in_child(lambda: ctypes.string_at(beyond, 1)) != 0, "the guard must bite"


def in_child(function):
    """Exit status of a process of its own, so that a fault is a failure and not the end of the tests."""
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        function()
        os._exit(0)
    return os.waitpid(child, 0)[1]
