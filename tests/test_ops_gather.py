"""gather_slice against plain indexing, bit for bit, for every backend on every device at hand."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import DTYPES, KERNELS, NEEDS_KERNELS, SERVED, draw, draw_bits, equal_bits, peak_growth, short
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nirvana.ops import gather_slice, use_backend

pytest_plugins = ("operators",)
pytestmark = pytest.mark.usefixtures("poison", "one_thread")

OTHERS = [torch.float64, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool, torch.uint8, torch.int8, torch.int16]
OTHERS += [torch.int32, torch.int64, torch.uint16, torch.complex64, torch.complex128]
ALL_DTYPES = [*DTYPES, *OTHERS]


def expected_of(weight: Tensor, kept: list[int], axis: int, unit: int) -> Tensor:
    """Plain indexing of the bytes, on the CPU: index kernels do not exist for every type."""
    index = torch.tensor([unit * index + offset for index in kept for offset in range(unit)], dtype=torch.int64)
    dtype, weight = weight.dtype, weight.cpu().contiguous()
    if axis == 0 and weight.dim() == 2:
        return weight.view(torch.uint8)[index].view(dtype)
    single = weight[..., None].view(torch.uint8).view(*weight.shape, -1)
    return single[..., index, :].reshape(*weight.shape[:-1], -1).view(dtype)


def assert_gathered(ours: Tensor, weight: Tensor, kept: list[int], axis: int, unit: int) -> None:
    shape = list(weight.shape)
    shape[axis] = len(kept) * unit
    assert list(ours.shape) == shape
    assert ours.dtype == weight.dtype
    assert ours.device == weight.device
    assert ours.is_contiguous()
    if ours.numel():
        assert equal_bits(ours, expected_of(weight, kept, axis, unit))
    # Neither a part of the weight's memory nor of a larger buffer, which it would keep alive.
    assert ours.untyped_storage().nbytes() == ours.numel() * ours.element_size()
    assert not ours.numel() or ours.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=short)
@pytest.mark.parametrize(
    ("shape", "axis", "unit", "kept"),
    [
        ((15, 7), 0, 3, [0, 2, 4]),
        ((15, 7), 0, 5, [2]),
        ((7, 15), 1, 3, [1, 3]),
        ((7, 15), 1, 1, [0, 7, 14]),
        ((9,), 0, 3, [0, 2]),
        ((6, 4), 0, 2, [2, 0, 1]),
        ((6, 4), 1, 1, [3, 3, 0]),
        ((6, 4), 0, 1, []),
        ((1, 1), 1, 1, [0]),
        ((0, 4), 0, 2, []),
        ((4, 0), 0, 2, [1]),
        ((4, 0), 1, 2, []),
        ((40, 1), 0, 4, [9, 0, 5]),
        ((33, 517), 1, 11, [46, 45, 2, 3, 4, 5, 40, 0]),
        ((517, 33), 0, 11, [46, 45, 2, 3, 4, 5, 40, 0]),
        ((517,), 0, 11, [46, 45, 2, 3, 4, 5, 40, 0]),
    ],
)
def test_gather_slice_is_plain_indexing(device, dtype, shape, axis, unit, kept):
    weight = draw_bits(shape, dtype, device, 20)
    for form in (kept, tuple(kept), torch.tensor(kept, dtype=torch.int64, device=device)):
        assert_gathered(gather_slice(weight, form, axis=axis, unit=unit), weight, kept, axis, unit)


def patterns(units: int) -> dict[str, list[int]]:
    """Kept units in the ways that plans and mistakes make them."""
    shuffle = random.Random(7)
    return {
        "all": list(range(units)),
        "all but the first": list(range(1, units)),
        "all but the last": list(range(units - 1)),
        "long runs": [i for i in range(units) if i % 100 > 3],
        "short runs": [i for i in range(units) if i % 3],
        "every other": list(range(0, units, 2)),
        "half at random": sorted(shuffle.sample(range(units), units // 2)),
        "backwards": list(range(units))[::-1],
        "shuffled": shuffle.sample(range(units), units),
        "with repeats": shuffle.choices(range(units), k=2 * units),
        "one often": [units - 1] * 70,
        "runs again and again": [*range(5, 90), *range(3, 80), 79, *range(79, 95)],
    }


@pytest.mark.parametrize("pattern", list(patterns(100)))
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.complex128], ids=short)
@pytest.mark.parametrize(("axis", "unit", "other"), [(0, 1, 77), (0, 3, 260), (1, 1, 33), (1, 3, 33), (1, 64, 3)])
def test_runs_and_orders(device, pattern, dtype, axis, unit, other):
    units = 150 if unit < 64 else 100
    shape = (units * unit, other) if axis == 0 else (other, units * unit)
    weight, kept = draw_bits(shape, dtype, device, 21), patterns(units)[pattern]
    assert_gathered(gather_slice(weight, kept, axis=axis, unit=unit), weight, kept, axis, unit)


@pytest.mark.usefixtures("sized")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=short)
@pytest.mark.parametrize(
    ("shape", "axis", "unit"), [((1026, 2051), 0, 513), ((1026, 2052), 1, 513), ((2051, 1026), 1, 1)]
)
def test_large_matrices_and_huge_units(device, dtype, shape, axis, unit):
    weight = draw_bits(shape, dtype, device, 22)
    units = shape[axis] // unit
    kept = random.Random(0).sample(range(units), max(1, units * 3 // 4))
    assert_gathered(gather_slice(weight, kept, axis=axis, unit=unit), weight, kept, axis, unit)
    kept = sorted(kept)
    assert_gathered(gather_slice(weight, kept, axis=axis, unit=unit), weight, kept, axis, unit)


@given(data=st.data())
@settings(derandomize=True, deadline=None, max_examples=150, database=None)
def test_gather_slice_of_anything(data):
    axis, unit = data.draw(st.integers(0, 1), "axis"), data.draw(st.integers(1, 9), "unit")
    units, other = data.draw(st.integers(1, 40), "units"), data.draw(st.integers(0, 40), "other")
    kept = data.draw(st.lists(st.integers(0, units - 1), max_size=60), "kept")
    dtype = data.draw(st.sampled_from(ALL_DTYPES), "type")
    step, offset = data.draw(st.integers(1, 3), "row step"), data.draw(st.integers(0, 9), "column offset")
    transposed = data.draw(st.booleans(), "transposed")
    shape = (units * unit, other) if axis == 0 else (other, units * unit)
    for device, backend in SERVED:
        weight = draw_bits((shape[0] * step, shape[1] + offset), dtype, device, 23)[::step, offset:]
        weight = weight.T.contiguous().T if transposed else weight
        with use_backend(backend):
            assert_gathered(gather_slice(weight, kept, axis=axis, unit=unit), weight, kept, axis, unit)


@pytest.mark.parametrize("axis", [0, 1])
def test_gather_slice_shares_no_memory(device, axis):
    """Also where everything is kept and a view would do."""
    weight = draw((6, 8), torch.float32, device, 21)
    copy = weight.clone()
    ours = gather_slice(weight, range(3 if axis == 0 else 4), axis=axis, unit=2)
    assert torch.equal(ours, weight)
    ours.zero_()
    assert torch.equal(weight, copy)


@pytest.mark.parametrize("axis", [0, 1])
def test_gather_slice_reads_any_strides(device, axis):
    wide = draw((24, 30), torch.bfloat16, device, 22)
    views = [wide[::2, 5:25], wide.T[3:23, 1:13], wide[0:1].expand(12, 30)[:, :20], wide[:, 0:1].expand(24, 20)]
    for weight in (*views, wide[:, 4:5].expand(24, 8), wide[:, 1::2][:, :12]):
        assert not weight.is_contiguous()
        ours = gather_slice(weight, [2, 0], axis=axis, unit=2)
        assert_gathered(ours, weight, [2, 0], axis, 2)


def test_gather_slice_of_strided_biases_and_single_columns(device):
    wide = draw((24, 30), torch.float16, device, 23)
    for bias in (wide[3], wide[:, 2], wide[0, ::2], wide[5, 6].expand(12)):
        assert_gathered(gather_slice(bias, [1, 0], axis=0, unit=3), bias, [1, 0], 0, 3)
    column = wide[:, 7:8]
    assert_gathered(gather_slice(column, [3, 1], axis=0, unit=2), column, [3, 1], 0, 2)
    assert_gathered(gather_slice(column, [0], axis=1), column, [0], 1, 1)


@pytest.mark.parametrize("axis", [0, 1])
def test_gather_slice_reads_lazy_conjugates_and_negatives(device, axis):
    """A tensor may carry a conjugation or a sign that is not in its memory."""
    weight = draw((6, 4), torch.complex64, device, 24) + 1j * draw((6, 4), torch.float32, device, 25)
    for lazy in (weight.conj(), torch._neg_view(weight.real.contiguous()), weight.conj().imag):
        ours = gather_slice(lazy, [1, 0], axis=axis, unit=2)
        assert torch.equal(ours, gather_slice(lazy.resolve_conj().resolve_neg().clone(), [1, 0], axis=axis, unit=2))
        index = torch.tensor([2, 3, 0, 1], device=device)
        assert torch.equal(ours, lazy.index_select(axis, index))


def test_gather_slice_keeps_bits(device):
    """NaN payloads and signed zeros too: a slice is a copy, never arithmetic."""
    bits = torch.tensor([0x7FC1, 0x8000, 0x0001, 0x7F80, 0xFF80, 0x3F81], dtype=torch.int32).to(torch.int16)
    weight = bits.view(torch.bfloat16)[:, None].to(device)
    ours = gather_slice(weight, [5, 4, 2, 1, 0], axis=0)
    assert ours.cpu().view(torch.int16)[:, 0].tolist() == bits[[5, 4, 2, 1, 0]].tolist()


def test_gather_slice_is_outside_the_graph(device):
    weight = draw((4, 4), torch.float32, device, 23).requires_grad_()
    assert not gather_slice(weight, [0, 2], axis=0).requires_grad
    assert not any(ours.requires_grad for ours in gather_slice([weight, weight], [0, 2], axis=1))


@pytest.mark.parametrize("kind", ["int32", "uint8", "numpy", "range", "strided", "other device", "empty int32"])
def test_forms_of_kept(device, kind):
    weight = draw((12, 5), torch.float32, device, 26)
    kept = {
        "int32": torch.tensor([4, 2, 0], dtype=torch.int32, device=device),
        "uint8": torch.tensor([4, 2, 0], dtype=torch.uint8, device=device),
        "numpy": np.array([4, 2, 0]),
        "range": range(0, 6, 2),
        "strided": torch.arange(6, device=device)[::2],
        "other device": torch.tensor([4, 2, 0]),
        "empty int32": torch.empty(0, dtype=torch.int32, device=device),
    }[kind]
    assert_gathered(gather_slice(weight, kept, axis=0, unit=2), weight, [int(index) for index in kept], 0, 2)


# Several weights that lose the same units.


@pytest.mark.parametrize("backwards", [False, True])
def test_several_weights_share_kept(device, backwards):
    """q of two heads a group beside k and v, biases among them, of several types and sizes."""
    shapes = [((12, 7), torch.bfloat16), ((12,), torch.float32), ((12, 33), torch.float32), ((12,), torch.bfloat16)]
    shapes += [((24, 1), torch.int8), ((12, 0), torch.float16), ((12, 260), torch.complex128), ((15,), torch.bool)]
    weights = [draw_bits(shape, dtype, device, 30 + number) for number, (shape, dtype) in enumerate(shapes)]
    weights.append(draw_bits((5, 12), torch.float32, device, 40).T)
    kept = [3, 0, 2] if backwards else [0, 2, 3]
    ours = gather_slice(weights, kept, axis=0, unit=3)
    assert isinstance(ours, list)
    assert len(ours) == len(weights)
    for one, weight in zip(ours, weights, strict=True):
        assert_gathered(one, weight, kept, 0, 3)
    owners = {one.untyped_storage().data_ptr() for one in ours if one.numel()}
    assert len(owners) == sum(one.numel() > 0 for one in ours)


def test_several_weights_share_kept_columns(device):
    weights = [
        draw_bits((rows, 20), dtype, device, 41) for rows, dtype in zip((1, 0, 7, 130), DTYPES * 2, strict=False)
    ]
    for ours, weight in zip(gather_slice(weights, [4, 1, 2], axis=1, unit=4), weights, strict=True):
        assert_gathered(ours, weight, [4, 1, 2], 1, 4)


def test_the_same_weight_twice(device):
    weight = draw((6, 4), torch.float32, device, 42)
    first, second = gather_slice((weight, weight), [2], axis=0, unit=2)
    first.zero_()
    assert_gathered(second, weight, [2], 0, 2)


def test_a_list_of_one_or_none(device):
    weight = draw((6, 4), torch.float32, device, 43)
    (ours,) = gather_slice([weight], [1], axis=0, unit=3)
    assert_gathered(ours, weight, [1], 0, 3)
    assert gather_slice([], [1], axis=0) == []
    assert [list(ours.shape) for ours in gather_slice([weight, weight[:, 0]], [], axis=0)] == [[0, 4], [0]]


@pytest.mark.usefixtures("restored_threads")
def test_bits_do_not_depend_on_the_threads(device):
    weight, kept = draw_bits((1030, 777), torch.float32, device, 44), patterns(777)["half at random"]
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        assert_gathered(gather_slice(weight, kept, axis=1), weight, kept, 1, 1)
        assert_gathered(gather_slice(weight, kept, axis=0), weight, kept, 0, 1)


# Weights that lie in files.

ON_CPU = pytest.mark.parametrize(
    "served", [pair for pair in SERVED if pair.device == "cpu"], ids="-".join, indirect=True
)


def assert_gathers_from_file(weight: Tensor, unit: int, kept: list[int]) -> None:
    for axis in range(weight.dim()):
        assert_gathered(gather_slice(weight, kept, axis=axis, unit=unit), weight, kept, axis, unit)


@ON_CPU
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn, torch.int8, torch.bool], ids=short)
def test_gather_slice_of_a_safetensors_file(served, tmp_path, dtype):
    weight, bias = draw_bits((24, 36), dtype, "cpu", 50), draw_bits((24,), dtype, "cpu", 51)
    save_file({"weight": weight, "bias": bias}, tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        stored = file.get_tensor("weight")
        assert equal_bits(stored, weight)
        assert_gathers_from_file(stored, 4, [5, 1, 2, 0])
        ours = gather_slice([stored, file.get_tensor("bias")], [5, 1], axis=0, unit=4)
    del stored
    assert_gathered(ours[0], weight, [5, 1], 0, 4)
    assert_gathered(ours[1], bias, [5, 1], 0, 4)


@ON_CPU
@pytest.mark.filterwarnings("ignore:The given (NumPy array|buffer) is not writable")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.complex128], ids=short)
@pytest.mark.parametrize("shift", [1, 3, 6])
def test_gather_slice_at_odd_addresses(served, tmp_path, dtype, shift):
    """Files of several types put numbers where they do not align; the file is mapped for reading alone."""
    weight = draw_bits((24, 36), dtype, "cpu", 52)
    path = tmp_path / "raw"
    path.write_bytes(b"x" * shift + weight.view(torch.uint8).numpy().tobytes())
    mapped = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    # view(dtype) refuses an offset that does not align, so the address moves and not the offset.
    read_only = np.memmap(path, mode="r", dtype=np.uint8, offset=shift)
    kinds = {"from_file": mapped[shift:], "memmap": torch.from_numpy(np.asarray(read_only))}
    for raw in kinds.values():
        assert raw.data_ptr() % 8 == shift
        stored = torch.frombuffer(raw.numpy(), dtype=dtype).view(24, 36)
        assert stored.data_ptr() == raw.data_ptr()
        assert_gathers_from_file(stored, 4, [5, 1, 2, 0])
        assert_gathers_from_file(stored[3:, 1:][:20, :32], 4, [4, 1, 2, 0])
        assert_gathers_from_file(stored[2], 4, [4, 1, 2, 0])
    assert path.read_bytes()[shift:] == weight.view(torch.uint8).numpy().tobytes()


@ON_CPU
def test_gather_slice_of_a_file_whose_header_has_an_odd_length(served, tmp_path):
    """Valid safetensors of other writers, whose tensors start anywhere."""
    flags, weight = draw_bits((3,), torch.uint8, "cpu", 53), draw_bits((8, 6), torch.float32, "cpu", 54)
    header = {
        "flags": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "weight": {"dtype": "F32", "shape": [8, 6], "data_offsets": [3, 3 + 8 * 6 * 4]},
    }
    path = tmp_path / "m.safetensors"
    write_safetensors(path, header, flags.numpy().tobytes() + weight.numpy().tobytes())
    with safe_open(path, framework="pt") as file:
        stored = file.get_tensor("weight")
    assert equal_bits(stored, weight)
    assert_gathers_from_file(stored, 2, [2, 0])


def write_safetensors(path: Path, header: dict, data: bytes) -> None:
    text = json.dumps(header).encode()
    text += b" " * (1 - len(text) % 2)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


# Large inputs that take no memory.


@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16], ids=short)
def test_indices_beyond_two_to_the_31(device, dtype):
    """Memory that nobody touches costs a CPU nothing."""
    size = 2**31 + 64
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 2**33:
        pytest.skip("needs 8 GB on the GPU")
    weight = torch.empty(size, dtype=dtype, device=device)
    weight[-64:] = draw_bits((64,), dtype, device, 60)
    weight[:4] = draw_bits((4,), dtype, device, 61)
    kept = [(size - 8) // 4, 0, (size - 64) // 4]
    wanted = torch.cat([weight[-8:-4], weight[:4], weight[-64:-60]])
    assert equal_bits(gather_slice(weight, kept, axis=0, unit=4), wanted)
    assert equal_bits(gather_slice(weight[None], kept, axis=1, unit=4), wanted[None])
    assert equal_bits(gather_slice(weight.view(-1, 2), kept, axis=0, unit=2), wanted.view(-1, 2))


@NEEDS_KERNELS
@pytest.mark.parametrize(("device", "backend"), KERNELS, ids=map("-".join, KERNELS))
@pytest.mark.parametrize("axis", [0, 1])
def test_nothing_but_the_result_takes_memory(device, backend, axis):
    """67 MB of weights, half of them kept; nor does the mapping of runs grow with the matrix."""
    weight = draw((4096, 4096), torch.float32, device, 62)
    kept = torch.arange(0, 4096, 2, device=device)
    with use_backend(backend):
        gather_slice(weight[:64, :64], kept[:8], axis=axis)
        assert peak_growth(device, lambda: gather_slice(weight, kept, axis=axis)) < weight.nbytes / 2 + 4e6


@pytest.mark.parametrize(
    ("shape", "kept", "axis", "unit", "message"),
    [
        ((6, 4), [0, 3], 0, 2, "kept units must lie in 0..2, got 0..3"),
        ((6, 4), [-1], 0, 2, "got -1..-1"),
        ((6, 4), [0], 0, 4, "units of 4 do not divide axis 0 of length 6"),
        ((6, 4), [0], 1, 3, "units of 3 do not divide axis 1 of length 4"),
        ((6, 4), [0], 2, 1, "axis 2"),
        ((6, 4), [0], -1, 1, "axis -1"),
        ((6,), [0], 1, 1, "axis 1"),
        ((6, 4), [0], 0, 0, "units of 0"),
        ((6, 4), [0], 0, -2, "units of -2"),
        ((2, 2, 2), [0], 0, 1, "3 dimensions"),
        ((), [0], 0, 1, "0 dimensions"),
        ((0, 4), [0], 0, 1, "kept units must lie in"),
        ((6, 4), [2**62], 0, 1, f"got {2**62}..{2**62}"),
        ((6, 4), [0.0, 1.0], 0, 1, "kept must hold unit indices, not torch.float32"),
        ((6, 4), [True, False, True], 0, 2, "of a mask take mask.nonzero()[:, 0]"),
        ((6, 4), [[0], [1]], 0, 1, "kept has 2 dimensions"),
        ((6, 4), 1, 0, 1, "kept has 0 dimensions"),
    ],
)
def test_gather_slice_refuses(device, shape, kept, axis, unit, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        gather_slice(torch.ones(shape, device=device), kept, axis=axis, unit=unit)


def test_gather_slice_refuses_what_one_of_several_has_not(device):
    weights = [torch.ones(6, 4, device=device), torch.ones(4, device=device)]
    with pytest.raises(ValueError, match=re.escape("kept units must lie in 0..1, got 0..2")):
        gather_slice(weights, [0, 2], axis=0, unit=2)
    with pytest.raises(ValueError, match="units of 3 do not divide axis 0 of length 4"):
        gather_slice(weights, [0], axis=0, unit=3)
    with pytest.raises(ValueError, match="axis 1 does not exist"):
        gather_slice(weights, [0], axis=1, unit=2)
    with pytest.raises(ValueError, match=f"weights are on meta and {device}"):
        gather_slice([weights[0], torch.ones(6, 4, device="meta")], [0], axis=0)
