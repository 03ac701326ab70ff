"""The tensor operators against float64 and plain indexing, on every device at hand."""

from __future__ import annotations

import itertools
import re

import pytest
import torch

from nirvana.ops import gather_slice, group_saliency

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: (rows, columns, axis, group): odd sizes, one, none, larger than any vector register or block of threads.
SHAPES = [
    (1, 1, 0, 1),
    (1, 1, 1, 1),
    (7, 13, 0, 1),
    (7, 13, 1, 1),
    (15, 37, 0, 5),
    (15, 36, 1, 9),
    (21, 1, 0, 3),
    (1, 21, 1, 7),
    (255, 513, 0, 51),
    (255, 513, 1, 27),
    (3, 4099, 0, 3),
    (4099, 3, 1, 1),
    (0, 5, 0, 2),
    (5, 0, 1, 3),
    (5, 0, 0, 1),
    (0, 6, 1, 2),
]

pytestmark = pytest.mark.parametrize("device", DEVICES)


def draw(shape, dtype, device, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(device)


def truth(weight, grad, axis, group):
    """Literal, in float64: one Python loop over the units."""
    product = (weight.double() * grad.double()).abs()
    parts = product.split(group, dim=axis)[: weight.shape[axis] // group]
    return torch.stack([part.sum() for part in parts]) if parts else product.new_zeros(0)


def eager(weight, grad, axis, group):
    """What one would write without thinking of the type: products and sums in the native one."""
    product = (weight * grad).abs()
    product = product.sum(dim=1 - axis) if product.dim() == 2 else product
    return product.view(-1, group).sum(dim=1)


def assert_no_worse_than_eager(ours, weight, grad, axis, group):
    exact = truth(weight, grad, axis, group)
    assert ours.dtype == torch.float32
    assert ours.shape == exact.shape
    error = (ours.double() - exact).abs()
    reference = (eager(weight, grad, axis, group).double() - exact).abs()
    assert (error <= reference + 1e-7 * exact).all()
    # Products of two 8- or 11-bit numbers are exact in fp32, so a pairwise sum alone rounds: a few units of 2^-24.
    assert (error <= 1e-6 * exact).all()


@pytest.mark.parametrize(("rows", "columns", "axis", "group"), SHAPES)
@pytest.mark.parametrize("types", itertools.product(DTYPES, DTYPES), ids=lambda t: "-".join(str(x)[6:] for x in t))
def test_group_saliency_is_no_worse_than_eager(device, rows, columns, axis, group, types):
    weight = draw((rows, columns), types[0], device, 0)
    grad = draw((rows, columns), types[1], device, 1)
    assert_no_worse_than_eager(group_saliency(weight, grad, axis=axis, group=group), weight, grad, axis, group)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "group"), [(0, 1), (1, 1), (37, 1), (36, 9), (1000, 8)])
def test_group_saliency_of_a_bias(device, dtype, length, group):
    weight, grad = draw((length,), dtype, device, 2), draw((length,), torch.float32, device, 3)
    ours = group_saliency(weight, grad, axis=0, group=group)
    assert_no_worse_than_eager(ours, weight, grad, 0, group)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("axis", "group"), [(0, 3), (1, 5)])
def test_group_saliency_reads_any_strides(device, dtype, axis, group):
    """Rows of a wider matrix, every second row, and a transposed gradient give the bits of contiguous copies."""
    wide = draw((42, 41), dtype, device, 4)
    weight = wide[::2, 3:28]
    grad = draw((25, 21), torch.float32, device, 5).T
    assert not weight.is_contiguous()
    assert not grad.is_contiguous()
    ours = group_saliency(weight, grad, axis=axis, group=group)
    assert_no_worse_than_eager(ours, weight.contiguous(), grad.contiguous(), axis, group)
    torch.testing.assert_close(
        ours, group_saliency(weight.contiguous(), grad.contiguous(), axis=axis, group=group), rtol=3e-7, atol=0
    )


def test_group_saliency_of_a_strided_bias(device):
    weight, grad = draw((60,), torch.float32, device, 6)[::2], draw((90,), torch.float32, device, 7)[::3]
    ours = group_saliency(weight, grad, axis=0, group=5)
    assert torch.equal(ours, group_saliency(weight.clone(), grad.clone(), axis=0, group=5))


def test_group_saliency_adds_to_out(device):
    weight, grad = draw((12, 7), torch.float32, device, 8), draw((12, 7), torch.float32, device, 9)
    before = draw((4,), torch.float32, device, 10)
    out = before.clone()
    returned = group_saliency(weight, grad, axis=0, group=3, out=out)
    assert returned.data_ptr() == out.data_ptr()
    assert torch.equal(out, before + group_saliency(weight, grad, axis=0, group=3))


def test_group_saliency_adds_to_a_view(device):
    """`out` may be a part of a larger buffer; its neighbours stay."""
    weight, grad = draw((6, 5), torch.bfloat16, device, 11), draw((6, 5), torch.bfloat16, device, 12)
    buffer = torch.full((10,), 2.0, device=device)
    group_saliency(weight, grad, axis=0, group=2, out=buffer[1:7:2])
    expected = torch.full((10,), 2.0, device=device)
    expected[1:7:2] += group_saliency(weight, grad, axis=0, group=2)
    assert torch.equal(buffer, expected)


def test_group_saliency_does_not_overflow_half_precision(device):
    weight = torch.full((2, 3), 60000.0, dtype=torch.float16, device=device)
    exact = float(weight[0, 0]) ** 2 * 3
    assert group_saliency(weight, weight, axis=0, group=1).tolist() == pytest.approx([exact] * 2, rel=1e-6)


def test_group_saliency_does_not_tie_in_bfloat16(device):
    """1000 neurons must have 1000 ranks: sums that were rounded to bf16 would share a few hundred values."""
    weight, grad = draw((1000, 64), torch.bfloat16, device, 13), draw((1000, 64), torch.bfloat16, device, 14)
    assert group_saliency(weight, grad, axis=0, group=1).unique().numel() > 995
    assert eager(weight, grad, 0, 1).unique().numel() < 300


def test_group_saliency_leaves_its_inputs_and_the_graph_alone(device):
    weight = draw((6, 5), torch.float32, device, 15).requires_grad_()
    grad = draw((6, 5), torch.float32, device, 16)
    copies = weight.detach().clone(), grad.clone()
    scores = group_saliency(weight, grad, axis=1, group=1)
    assert not scores.requires_grad
    assert torch.equal(weight, copies[0])
    assert torch.equal(grad, copies[1])


def test_group_saliency_hands_nan_and_infinity_on(device):
    weight = torch.ones(3, 4, device=device)
    grad = torch.ones(3, 4, device=device)
    grad[0, 1], grad[2, 3] = float("nan"), float("-inf")
    scores = group_saliency(weight, grad, axis=0, group=1).tolist()
    assert scores[0] != scores[0]
    assert scores[1:] == [4.0, float("inf")]


@pytest.mark.parametrize(
    ("weight", "grad", "axis", "group", "out", "message"),
    [
        ((4, 6), (4, 5), 0, 1, None, "grad has shape [4, 5], weight [4, 6]"),
        ((4, 6), (24,), 0, 1, None, "grad has shape"),
        ((4, 6), (4, 6), 0, 3, None, "units of 3 do not divide axis 0 of length 4"),
        ((4, 6), (4, 6), 1, 4, None, "units of 4 do not divide axis 1 of length 6"),
        ((4, 6), (4, 6), 0, 0, None, "units of 0"),
        ((4, 6), (4, 6), 0, -2, None, "units of -2"),
        ((4, 6), (4, 6), 2, 1, None, "axis 2"),
        ((4, 6), (4, 6), -1, 1, None, "axis -1"),
        ((4,), (4,), 1, 1, None, "axis 1"),
        ((2, 2, 2), (2, 2, 2), 0, 1, None, "3 dimensions"),
        ((), (), 0, 1, None, "0 dimensions"),
        ((4, 6), (4, 6), 0, 2, torch.zeros(4), "it must be torch.float32 [2]"),
        ((4, 6), (4, 6), 0, 2, torch.zeros(2, 1), "it must be torch.float32 [2]"),
        ((4, 6), (4, 6), 0, 2, torch.zeros(2, dtype=torch.float64), "torch.float64"),
        ((4, 6), (4, 6), 0, 2, torch.zeros(2, dtype=torch.bfloat16), "torch.bfloat16"),
    ],
)
def test_group_saliency_refuses(device, weight, grad, axis, group, out, message):
    out = None if out is None else out.to(device)
    with pytest.raises(ValueError, match=re.escape(message)):
        group_saliency(
            torch.ones(weight, device=device), torch.ones(grad, device=device), axis=axis, group=group, out=out
        )
    assert out is None or not out.any(), "a refused call must not have written"


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.int8, torch.bool])
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
    ],
)
def test_gather_slice_is_plain_indexing(device, dtype, shape, axis, unit, kept):
    weight = draw(shape, torch.float32, device, 20).mul(50).to(dtype)
    rows = [unit * index + offset for index in kept for offset in range(unit)]
    index = torch.tensor(rows, dtype=torch.int64, device=device)
    expected = weight[index] if axis == 0 else weight[:, index]
    for form in (kept, tuple(kept), torch.tensor(kept, dtype=torch.int64, device=device)):
        ours = gather_slice(weight, form, axis=axis, unit=unit)
        assert ours.dtype == dtype
        assert ours.shape == expected.shape
        assert torch.equal(ours, expected)
        assert ours.is_contiguous()


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
    for weight in (wide[::2, 5:25], wide.T[3:23, 1:13], wide[0:1].expand(12, 30)[:, :20]):
        assert not weight.is_contiguous()
        ours = gather_slice(weight, [2, 0], axis=axis, unit=4)
        assert torch.equal(ours, gather_slice(weight.contiguous(), [2, 0], axis=axis, unit=4))
        assert ours.is_contiguous()


def test_gather_slice_keeps_bits(device):
    """NaN payloads and signed zeros too: a slice is a copy, never arithmetic."""
    bits = torch.tensor([0x7FC1, 0x8000, 0x0001, 0x7F80, 0xFF80, 0x3F81], dtype=torch.int32).to(torch.int16)
    weight = bits.view(torch.bfloat16)[:, None].to(device)
    ours = gather_slice(weight, [5, 4, 2, 1, 0], axis=0)
    assert ours.cpu().view(torch.int16)[:, 0].tolist() == bits[[5, 4, 2, 1, 0]].tolist()


def test_gather_slice_is_outside_the_graph(device):
    weight = draw((4, 4), torch.float32, device, 23).requires_grad_()
    assert not gather_slice(weight, [0, 2], axis=0).requires_grad


@pytest.mark.parametrize(
    ("shape", "kept", "axis", "unit", "message"),
    [
        ((6, 4), [0, 3], 0, 2, "kept units must lie in 0..2, got 0..3"),
        ((6, 4), [-1], 0, 2, "got -1..-1"),
        ((6, 4), [0], 0, 4, "units of 4 do not divide axis 0 of length 6"),
        ((6, 4), [0], 1, 3, "units of 3 do not divide axis 1 of length 4"),
        ((6, 4), [0], 2, 1, "axis 2"),
        ((6,), [0], 1, 1, "axis 1"),
        ((6, 4), [0], 0, 0, "units of 0"),
        ((2, 2, 2), [0], 0, 1, "3 dimensions"),
        ((0, 4), [0], 0, 1, "kept units must lie in"),
    ],
)
def test_gather_slice_refuses(device, shape, kept, axis, unit, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        gather_slice(torch.ones(shape, device=device), kept, axis=axis, unit=unit)
