"""The gather kernel against plain indexing, bit for bit."""

from __future__ import annotations

import pytest
import torch
from operators import draw_bits, equal_bits, short
from torch import Tensor

from nirvana.kernels import gather
from nirvana.ops import gather_slice
from nirvana.ops.backends import triton

DTYPES = [torch.int8, torch.bool, torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.float64, torch.complex128]


def expected(weight: Tensor, kept: list[int], axis: int, unit: int) -> Tensor:
    """Indexing of bytes, because not every type has an index kernel."""
    index = torch.tensor([one * unit + offset for one in kept for offset in range(unit)])
    raw = weight.contiguous()[..., None].view(torch.uint8).view(*weight.shape, -1)
    return raw.index_select(axis, index).flatten(-2).view(weight.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize(
    ("shape", "axis", "unit", "kept"),
    [
        ((15, 7), 0, 3, [0, 2, 4]),
        ((40, 64), 0, 4, [9, 0, 5, 5]),
        ((12, 4096), 0, 2, [5, 1]),
        ((7, 15), 1, 3, [3, 1, 1]),
        ((10, 48), 1, 8, [5, 0]),
        ((5, 600), 1, 1, [599, *range(300)]),
        ((1, 1), 1, 1, [0]),
    ],
    ids=str,
)
def test_every_element_size(dtype, shape, axis, unit, kept):
    weight = draw_bits(shape, dtype, "cpu", 0)
    ours = gather_slice(weight, kept, axis=axis, unit=unit)
    assert ours.is_contiguous()
    assert equal_bits(ours, expected(weight, kept, axis, unit))


def test_nan_payloads_and_signed_zeros():
    bits = torch.tensor([[0x7FC1, 0x8000, 0x0001, 0x7F80, 0xFF81, 0x3F81]], dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        ours = gather_slice(bits.view(dtype), [5, 4, 1, 0], axis=1)
        assert torch.equal(ours.view(torch.int16), bits[:, [5, 4, 1, 0]])


@pytest.mark.parametrize("offset", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_rows_lie_apart_at_any_address(axis, offset):
    frame = draw_bits((24, 96), torch.bfloat16, "cpu", 1)
    weight = frame[1::2, offset : offset + 80]
    assert equal_bits(gather_slice(weight, [2, 0], axis=axis, unit=4), expected(weight, [2, 0], axis, 4))
    raw = draw_bits((24 * 48 + 16,), torch.uint8, "cpu", 2)[offset : offset + 24 * 48].view(24, 48)
    assert equal_bits(gather_slice(raw, [2, 0], axis=axis, unit=4), expected(raw, [2, 0], axis, 4))


@pytest.mark.parametrize("gap", [1, 2, 8])
def test_wide_rows_that_lie_a_few_integers_apart(gap):
    """Addresses and results of whole vectors, rows of none: a hint of 16 integers would be false."""
    weight = draw_bits((12, 64 + gap), torch.float64, "cpu", 5)[:, :64]
    assert equal_bits(gather_slice(weight, [2, 0], axis=0, unit=4), expected(weight, [2, 0], 0, 4))


def test_units_of_one_and_of_two_integers_share_a_launch():
    """Two bf16 columns are one integer of 32 bits, two fp32 ones of rows that lie 36 bytes apart are two."""
    narrow, wide = draw_bits((6, 8), torch.bfloat16, "cpu", 6), draw_bits((6, 9), torch.float32, "cpu", 7)[:, :8]
    for weights in ([narrow, wide], [wide, narrow]):
        for ours, weight in zip(gather_slice(weights, [3, 0], axis=1, unit=2), weights, strict=True):
            assert equal_bits(ours, expected(weight, [3, 0], 1, 2))


@pytest.mark.parametrize("axis", [0, 1])
def test_several_shapes_and_types_share_kept(axis, monkeypatch):
    monkeypatch.setattr(gather, "SEARCH", 2)
    shapes = [(12, 33), (24, 32), (12, 1), (36, 80), (12, 33)]
    shapes = [shape if axis == 0 else shape[::-1] for shape in shapes]
    types = [torch.bfloat16, torch.bfloat16, torch.int8, torch.float32, torch.complex128]
    weights = [draw_bits(shape, dtype, "cpu", 3) for shape, dtype in zip(shapes, types, strict=True)]
    weights.append(draw_bits((12,), torch.float32, "cpu", 4)) if axis == 0 else None
    for ours, weight in zip(gather_slice(weights, [3, 0, 2], axis=axis, unit=3), weights, strict=True):
        assert equal_bits(ours, expected(weight, [3, 0, 2], axis, 3))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("unit", [1, 3])
def test_one_matrix_needs_no_table(axis, unit, monkeypatch):
    """Its description must be part of the launch: a captured CUDA graph would not repeat a copy from the host."""

    class NoTable:
        def __init__(self) -> None:
            raise AssertionError("a table for one matrix")

    weight, bits = draw_bits((36, 45), torch.bfloat16, "cpu", 6), draw_bits((36, 45), torch.int8, "cpu", 7)
    together = gather_slice([weight, weight], [3, 0, 2], axis=axis, unit=unit)
    monkeypatch.setattr(gather, "Table", NoTable)
    ours = gather_slice(weight, [3, 0, 2], axis=axis, unit=unit)
    assert equal_bits(ours, expected(weight, [3, 0, 2], axis, unit))
    assert all(equal_bits(ours, one) for one in together)
    # One of each width of integers is one of each launch.
    for ours, one in zip(gather_slice([weight, bits], [4, 1], axis=axis, unit=unit), (weight, bits), strict=True):
        assert equal_bits(ours, expected(one, [4, 1], axis, unit))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("size", [1, 15, 16, 17, 33])
def test_blocks_that_are_not_full_write_their_own_rows_alone(axis, size):
    """Every row and column of a block of 16 x 256 or 8 x 256, and what lies behind the result."""
    for dtype, columns in ((torch.bfloat16, 257), (torch.float32, 255), (torch.float64, 258)):
        weight = draw_bits((size, columns), dtype, "cpu", 8)
        kept = torch.arange(weight.shape[axis] - 1, -1, -1)
        memory = torch.full((weight.numel() + 600,), 7, dtype=dtype)
        out = memory[300:-300].view(weight.shape)
        triton.gather([weight], kept, axis, 1, [out])
        assert equal_bits(out, expected(weight, kept.tolist(), axis, 1))
        assert (memory[:300] == 7).all()
        assert (memory[-300:] == 7).all()


@pytest.mark.parametrize("axis", [0, 1])
def test_indices_of_64_bits(axis, monkeypatch):
    monkeypatch.setattr(gather, "_LARGE", 1)
    for count in (1, 2):
        weights = [draw_bits((40, 48), torch.bfloat16, "cpu", 9)] * count
        for ours in gather_slice(weights, [4, 0, 7], axis=axis, unit=4):
            assert equal_bits(ours, expected(weights[0], [4, 0, 7], axis, 4))


def test_rows_more_than_two_to_the_31_elements_apart():
    """Memory that nobody touches costs nothing."""
    stride = 2**31 // 3 + 5
    weight = torch.empty(3 * stride + 40, dtype=torch.int8).as_strided((4, 40), (stride, 1))
    weight.copy_(draw_bits((4, 40), torch.int8, "cpu", 5))
    for axis in (0, 1):
        assert equal_bits(gather_slice(weight, [1, 0], axis=axis, unit=2), expected(weight, [1, 0], axis, 2))
