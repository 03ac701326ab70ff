"""group_saliency and foreach_group_saliency against float64, for every backend on every device at hand."""

from __future__ import annotations

import copy
import itertools
import pickle
import random
import re
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import DTYPES, INTERPRETED, KERNELS, NEEDS_KERNELS, SERVED, draw, peak_growth, short
from torch import Tensor, nn

from nirvana.ops import (
    STATISTICS,
    SaliencyEntry,
    foreach_group_saliency,
    group_saliency,
    plan_group_saliency,
    use_backend,
)

pytest_plugins = ("operators",)
pytestmark = pytest.mark.usefixtures("poison", "one_thread")

ALL = list(STATISTICS)
#: What each statistic sums, once more, independent of the package.
TERMS = {
    "taylor": lambda w, g: (g * w).abs(),
    "signed": lambda w, g: g * w,
    "ntk": lambda w, g: g.abs(),
    "fisher": lambda w, g: (g * w) ** 2,
    "magnitude": lambda w, g: w.abs(),
    "squared": lambda w, g: w**2,
}
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
    (130, 259, 0, 130),
    (129, 260, 1, 260),
    (0, 5, 0, 2),
    (5, 0, 1, 3),
    (5, 0, 0, 1),
    (0, 6, 1, 2),
]
MIXES = list(itertools.product(DTYPES, DTYPES))


def truth(weight: Tensor, grad: Tensor | None, axis: int, group: int, name: str) -> tuple[Tensor, Tensor]:
    """Literal, in float64: one Python loop over the units. The sums, and the sums of the absolute terms."""
    terms = TERMS[name](weight.double(), None if grad is None else grad.double())
    parts = terms.split(group, dim=axis)[: weight.shape[axis] // group]
    if not parts:
        return terms.new_zeros(0), terms.new_zeros(0)
    return torch.stack([part.sum() for part in parts]), torch.stack([part.abs().sum() for part in parts])


def eager(weight: Tensor, grad: Tensor | None, axis: int, group: int, name: str) -> Tensor:
    """What one would write without thinking of the type: products and sums in the native one."""
    terms = TERMS[name](weight, grad)
    terms = terms.sum(dim=1 - axis) if terms.dim() == 2 else terms
    return terms.view(-1, group).sum(dim=1)


def eager_fp32(weight: Tensor, grad: Tensor | None, axis: int, group: int, name: str) -> Tensor:
    return eager(weight.float(), None if grad is None else grad.float(), axis, group, name)


def assert_no_worse_than_eager(ours, weight, grad, axis: int, group: int, name: str = "taylor", luck=2e-7) -> None:
    exact, size = truth(weight, grad, axis, group, name)
    assert ours.dtype == torch.float32
    assert ours.shape == exact.shape
    error = (ours.double() - exact).abs()
    # Eager's error may be 0 by luck. Three roundings (of a product, its square, the sum) are 1.8e-7 of the result.
    for reference in (eager, eager_fp32):
        theirs = (reference(weight, grad, axis, group, name).double() - exact).abs()
        assert (error <= theirs + luck * size).all(), f"{name}: {(error - theirs).max()} worse than {reference}"
    # Products of two 8- or 11-bit numbers are exact in fp32, so a pairwise sum alone rounds: a few units of 2^-24.
    assert (error <= 1e-6 * size).all(), f"{name}: relative error {(error / size).max()}"


@pytest.mark.parametrize(("rows", "columns", "axis", "group"), SHAPES)
@pytest.mark.parametrize("types", MIXES, ids=short)
def test_group_saliency_is_no_worse_than_eager(device, rows, columns, axis, group, types):
    weight = draw((rows, columns), types[0], device, 0)
    grad = draw((rows, columns), types[1], device, 1)
    assert_no_worse_than_eager(group_saliency(weight, grad, axis=axis, group=group), weight, grad, axis, group)
    ours = group_saliency(weight, grad, axis=axis, group=group, statistics=ALL)
    assert ours.shape == (len(ALL), weight.shape[axis] // group)
    assert ours.is_contiguous()
    for name, row in zip(ALL, ours, strict=True):
        assert_no_worse_than_eager(row, weight, grad, axis, group, name)


@pytest.mark.usefixtures("sized")
@pytest.mark.parametrize(
    "types", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float16, torch.float32)], ids=short
)
@pytest.mark.parametrize("axis", [0, 1])
def test_errors_of_long_sums_are_no_larger_than_those_of_eager(device, types, axis):
    """Root mean square and largest of 400 units: what one lucky sum cannot decide."""
    shape = (400, 4001) if axis == 0 else (4001, 400)
    weight, grad = draw(shape, types[0], device, 2), draw(shape, types[1], device, 3)
    ours = group_saliency(weight, grad, axis=axis, group=1, statistics=ALL)
    for name, row in zip(ALL, ours, strict=True):
        terms = TERMS[name](weight.double(), grad.double())
        exact, size = terms.sum(dim=1 - axis), terms.abs().sum(dim=1 - axis)
        error = (row.double() - exact).abs() / size
        theirs = (eager_fp32(weight, grad, axis, 1, name).double() - exact).abs() / size
        # 2^-25 is the rounding of the result to fp32, on average less.
        assert error.square().mean().sqrt() <= theirs.square().mean().sqrt() + 2**-26, name
        assert error.max() <= theirs.max() + 2**-24, name


@pytest.mark.parametrize("axis", [0, 1])
def test_each_statistic_alone(device, axis):
    weight, grad = draw((12, 10), torch.bfloat16, device, 4), draw((12, 10), torch.float32, device, 5)
    for name in ALL:
        ours = group_saliency(weight, grad, axis=axis, group=2, statistics=name)
        assert_no_worse_than_eager(ours, weight, grad, axis, 2, name)
        assert torch.equal(group_saliency(weight, grad, axis=axis, group=2, statistics=[name]), ours[None])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("shape", "axis", "group"), [((6, 19), 0, 3), ((19, 6), 1, 2)])
def test_every_subset_of_statistics_in_any_order(device, seed, shape, axis, group):
    weight, grad = draw(shape, torch.float16, device, 6), draw(shape, torch.bfloat16, device, 7)
    shuffle = random.Random(seed)
    for count in range(1, len(ALL) + 1):
        for names in itertools.combinations(ALL, count):
            names = shuffle.sample(names, count)
            ours = group_saliency(weight, grad, axis=axis, group=group, statistics=tuple(names))
            assert ours.shape == (count, shape[axis] // group)
            for name, row in zip(names, ours, strict=True):
                assert_no_worse_than_eager(row, weight, grad, axis, group, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "group"), [(0, 1), (1, 1), (37, 1), (36, 9), (1000, 8), (1000, 1000)])
def test_group_saliency_of_a_bias(device, dtype, length, group):
    weight, grad = draw((length,), dtype, device, 2), draw((length,), torch.float32, device, 3)
    for name, ours in zip(ALL, group_saliency(weight, grad, axis=0, group=group, statistics=ALL), strict=True):
        assert_no_worse_than_eager(ours, weight, grad, 0, group, name)


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


@pytest.mark.parametrize("axis", [0, 1])
def test_group_saliency_of_repeated_rows_and_columns(device, axis):
    """Strides of 0, in either dimension, and a column of a wider matrix."""
    row, column = draw((1, 30), torch.float32, device, 20), draw((24, 1), torch.bfloat16, device, 21)
    weight, grad = row.expand(24, 30), column.expand(24, 30)
    ours = group_saliency(weight, grad, axis=axis, group=3)
    assert_no_worse_than_eager(ours, weight.contiguous(), grad.contiguous(), axis, 3)
    wide = draw((24, 30), torch.float16, device, 22)
    ours = group_saliency(wide[:, 7:8], column, axis=0, group=3)
    assert_no_worse_than_eager(ours, wide[:, 7:8].contiguous(), column, 0, 3)


def test_group_saliency_of_a_strided_bias(device):
    weight, grad = draw((60,), torch.float32, device, 6)[::2], draw((90,), torch.float32, device, 7)[::3]
    ours = group_saliency(weight, grad, axis=0, group=5)
    assert torch.equal(ours, group_saliency(weight.clone(), grad.clone(), axis=0, group=5))
    ours = group_saliency(weight.flip(0), grad[:1].expand(30), axis=0, group=5)
    assert torch.equal(ours, group_saliency(weight.flip(0).clone(), grad[:1].repeat(30), axis=0, group=5))


@pytest.mark.parametrize("axis", [0, 1])
def test_group_saliency_reads_lazy_negatives(device, axis):
    """A tensor may carry a sign that is not in its memory."""
    weight, grad = draw((6, 4), torch.float32, device, 8), draw((6, 4), torch.float32, device, 9)
    ours = group_saliency(torch._neg_view(weight), grad, axis=axis, group=2, statistics="signed")
    assert torch.equal(ours, group_saliency(-weight, grad, axis=axis, group=2, statistics="signed"))


@given(data=st.data())
@settings(derandomize=True, deadline=None, max_examples=120, database=None)
def test_group_saliency_of_anything(data):
    """Any size, group, type, stride, offset and set of statistics, on all that is served."""
    axis = data.draw(st.integers(0, 1), "axis")
    group = data.draw(st.sampled_from([1, 1, 2, 3, 8, 17, 64]), "group")
    shape = [data.draw(st.one_of(st.integers(0, 5), st.integers(0, 90)), "length") for _ in range(2)]
    shape[axis] = shape[axis] // group * group
    types = data.draw(st.sampled_from(MIXES), "types")
    names = data.draw(st.lists(st.sampled_from(ALL), min_size=1, unique=True), "statistics")
    strides = [data.draw(st.tuples(st.integers(1, 3), st.integers(0, 9), st.booleans()), "strides") for _ in range(2)]
    for device, backend in SERVED:
        inputs = []
        for seed, (dtype, (step, offset, transposed)) in enumerate(zip(types, strides, strict=True)):
            wide = draw((shape[0] * step, shape[1] + offset), dtype, device, seed)
            view = wide[::step, offset:]
            inputs.append(view.T.contiguous().T if transposed else view)
        with use_backend(backend):
            ours = group_saliency(*inputs, axis=axis, group=group, statistics=names)
        for name, row in zip(names, ours, strict=True):
            # Transposed, eager sums in another order: 2.6 times 2^-24 worse than with contiguous tensors was seen.
            assert_no_worse_than_eager(row, *inputs, axis, group, name, luck=4e-7)


@pytest.mark.parametrize("statistics", ["taylor", "signed", ["ntk"], ["taylor", "magnitude"], ["squared", "taylor"]])
@pytest.mark.parametrize(("axis", "group"), [(0, 3), (1, 1)])
def test_group_saliency_adds_to_out(device, statistics, axis, group):
    weight, grad = draw((12, 7), torch.float32, device, 8), draw((12, 7), torch.float32, device, 9)
    alone = group_saliency(weight, grad, axis=axis, group=group, statistics=statistics)
    before = draw(tuple(alone.shape), torch.float32, device, 10)
    out = before.clone()
    returned = group_saliency(weight, grad, axis=axis, group=group, statistics=statistics, out=out)
    assert returned.data_ptr() == out.data_ptr()
    assert torch.equal(out, before + alone)


@pytest.mark.parametrize("statistics", ["taylor", ["taylor", "fisher"], ["fisher", "taylor"]])
def test_group_saliency_adds_to_a_view(device, statistics):
    """`out` may be a part of a larger buffer; its neighbours stay."""
    weight, grad = draw((6, 5), torch.bfloat16, device, 11), draw((6, 5), torch.bfloat16, device, 12)
    sums = group_saliency(weight, grad, axis=0, group=2, statistics=statistics)
    rows = slice(0, 1) if isinstance(statistics, str) else slice(0, 4, 2)
    for columns in (slice(1, 7, 2), slice(4, 7)):
        buffer = torch.full((5, 10), 2.0, device=device)
        expected = buffer.clone()
        view, wanted = buffer[rows, columns], expected[rows, columns]
        view, wanted = (view[0], wanted[0]) if isinstance(statistics, str) else (view, wanted)
        group_saliency(weight, grad, axis=0, group=2, statistics=statistics, out=view)
        wanted += sums
        assert torch.equal(buffer, expected)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("axis", [0, 1])
def test_an_empty_matrix_adds_nothing(device, shape, axis):
    weight = torch.ones(shape, device=device)
    out = torch.full((shape[axis],), 3.0, device=device)
    group_saliency(weight, weight, axis=axis, group=1, out=out)
    assert torch.equal(out, torch.full((shape[axis],), 3.0, device=device))
    sums = group_saliency(weight, weight, axis=axis, group=1, statistics=ALL)
    assert torch.equal(sums, torch.zeros((len(ALL), shape[axis]), device=device))


@pytest.mark.parametrize("statistics", ["magnitude", "squared", ["squared", "magnitude"]])
@pytest.mark.parametrize("axis", [0, 1])
def test_statistics_of_the_weight_alone_need_no_gradient(device, statistics, axis):
    weight = draw((8, 34), torch.float16, device, 13)
    ours = group_saliency(weight, None, axis=axis, group=2, statistics=statistics)
    for name, row in zip(
        [statistics] if isinstance(statistics, str) else statistics, ours.view(-1, ours.shape[-1]), strict=True
    ):
        assert_no_worse_than_eager(row, weight, None, axis, 2, name)
    with_nan = group_saliency(weight, torch.full_like(weight, torch.nan), axis=axis, group=2, statistics=statistics)
    assert torch.equal(with_nan, ours)


@pytest.mark.parametrize("axis", [0, 1])
def test_statistics_keep_to_themselves(device, axis):
    """A NaN in the weight is none in the sums of the gradient, and the other way round."""
    weight, grad = draw((4, 6), torch.float32, device, 14), draw((4, 6), torch.float32, device, 15)
    weight[0, 0] = grad[3, 5] = torch.nan
    unit = slice(0, 1), slice(-1, None)
    ours = dict(zip(ALL, group_saliency(weight, grad, axis=axis, group=1, statistics=ALL).isnan(), strict=True))
    for name in ("taylor", "signed", "fisher"):
        assert ours[name][unit[0]].all()
        assert ours[name][unit[1]].all()
        assert ours[name].sum() == 2
    assert ours["ntk"].nonzero().tolist() == [[ours["ntk"].numel() - 1]]
    for name in ("magnitude", "squared"):
        assert ours[name].nonzero().tolist() == [[0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.float8_e5m2], ids=short)
@pytest.mark.parametrize("axis", [0, 1])
def test_other_types_are_read_through_fp32(device, dtype, axis):
    weight, grad = draw((6, 15), dtype, device, 16), draw((6, 15), torch.bfloat16, device, 17)
    for first, second in ((weight, grad), (grad, weight), (weight, weight)):
        ours = group_saliency(first, second, axis=axis, group=3, statistics=ALL)
        assert torch.equal(ours, group_saliency(first.float(), second.float(), axis=axis, group=3, statistics=ALL))


def test_group_saliency_does_not_overflow_half_precision(device):
    weight = torch.full((2, 3), 60000.0, dtype=torch.float16, device=device)
    exact = float(weight[0, 0]) ** 2 * 3
    assert group_saliency(weight, weight, axis=0, group=1).tolist() == pytest.approx([exact] * 2, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=short)
@pytest.mark.parametrize("axis", [0, 1])
def test_group_saliency_reads_subnormal_and_extreme_numbers(device, backend, dtype, axis):
    if INTERPRETED and backend == "triton" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter reads subnormal bf16 numbers as 0; compiled code does not")
    info = torch.finfo(dtype)
    values = [
        info.smallest_normal / 2,
        info.smallest_normal,
        info.tiny * 3,
        -info.smallest_normal / 4,
        info.max,
        info.min,
    ]
    weight = torch.tensor([values], dtype=dtype, device=device)
    weight = weight if axis == 1 else weight.T.contiguous()
    if device == "cuda" and dtype == torch.float32:
        weight = weight.where(weight.abs() >= info.smallest_normal, 0)
    ones = torch.ones_like(weight)
    expected = weight.double().abs().flatten().float()
    assert torch.equal(group_saliency(weight, ones, axis=axis, group=1), expected)
    assert torch.equal(group_saliency(weight, None, axis=axis, group=1, statistics="magnitude"), expected)


def test_group_saliency_does_not_tie_in_bfloat16(device):
    """1000 neurons must have 1000 ranks: sums that were rounded to bf16 would share a few hundred values."""
    weight, grad = draw((1000, 64), torch.bfloat16, device, 13), draw((1000, 64), torch.bfloat16, device, 14)
    assert group_saliency(weight, grad, axis=0, group=1).unique().numel() > 995
    assert eager(weight, grad, 0, 1, "taylor").unique().numel() < 300


@pytest.mark.usefixtures("sized")
@pytest.mark.parametrize("axis", [0, 1])
def test_neurons_chosen_in_bfloat16_are_those_of_float64(device, axis):
    """The fifth with the lowest scores, of weights and gradients in bf16: eager bf16 takes wrong ones."""
    shape = (3000, 512) if axis == 0 else (512, 3000)
    weight, grad = draw(shape, torch.bfloat16, device, 18), draw(shape, torch.bfloat16, device, 19)
    exact = (weight.double() * grad.double()).abs().sum(dim=1 - axis)
    chosen = set(exact.argsort()[:600].tolist())
    assert set(group_saliency(weight, grad, axis=axis, group=1).argsort()[:600].tolist()) == chosen
    assert set(eager(weight, grad, axis, 1, "taylor").argsort()[:600].tolist()) != chosen


def test_group_saliency_leaves_its_inputs_and_the_graph_alone(device):
    weight = draw((6, 5), torch.float32, device, 15).requires_grad_()
    grad = draw((6, 5), torch.float32, device, 16)
    copies = weight.detach().clone(), grad.clone()
    scores = group_saliency(weight, grad, axis=1, group=1)
    assert not scores.requires_grad
    out = torch.zeros(5, device=device)
    assert not group_saliency(weight, grad, axis=1, group=1, out=out).requires_grad
    foreach_group_saliency([SaliencyEntry(weight, grad, 1, 1, out)])
    assert not out.requires_grad
    assert torch.equal(weight, copies[0])
    assert torch.equal(grad, copies[1])


@pytest.mark.parametrize("axis", [0, 1])
def test_group_saliency_hands_nan_and_infinity_on(device, axis):
    weight = torch.ones(3, 4, device=device)
    grad = torch.ones(3, 4, device=device)
    grad[0, 1], grad[2, 3] = float("nan"), float("-inf")
    if axis == 1:
        weight, grad = weight.T.contiguous(), grad.T.contiguous()
    scores = group_saliency(weight, grad, axis=axis, group=1).tolist()
    assert scores[0] != scores[0]
    assert scores[1:] == [4.0, float("inf")]
    signed = group_saliency(weight, grad, axis=axis, group=1, statistics="signed").tolist()
    assert signed[1:] == [4.0, float("-inf")]


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


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        ("fischer", "statistic 'fischer' must be one of taylor, signed, ntk, fisher, magnitude, squared"),
        (["taylor", "l2"], "statistic 'l2' must be one of"),
        ([], "must name at least one statistic"),
        (["taylor", "taylor"], "each one once"),
    ],
)
def test_saliency_refuses_statistics(device, statistics, message):
    weight, out = torch.ones(4, 6, device=device), torch.zeros(4, device=device)
    with pytest.raises(ValueError, match=re.escape(message)):
        group_saliency(weight, weight, axis=0, group=1, statistics=statistics)
    with pytest.raises(ValueError, match=re.escape(message)):
        foreach_group_saliency([SaliencyEntry(weight, weight, 0, 1, out)], statistics=statistics)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grad": None}, "grad is None"),
        ({"grad": None, "statistics": ["magnitude", "ntk"]}, "grad is None"),
        ({"weight": torch.ones(4, 6, dtype=torch.int8)}, "weight is torch.int8"),
        ({"weight": torch.ones(4, 6, dtype=torch.complex64)}, "weight is torch.complex64"),
        ({"grad": torch.ones(4, 6, dtype=torch.int64)}, "grad is torch.int64"),
        ({"statistics": ["taylor", "ntk"], "out": torch.zeros(4)}, "it must be torch.float32 [2, 4]"),
        ({"statistics": ["taylor"], "out": torch.zeros(4)}, "it must be torch.float32 [1, 4]"),
        ({"statistics": "taylor", "out": torch.zeros(1, 4)}, "it must be torch.float32 [4]"),
    ],
)
def test_group_saliency_refuses_types_and_missing_gradients(device, change, message):
    arguments = {"weight": torch.ones(4, 6), "grad": torch.ones(4, 6), "axis": 0, "group": 1, **change}
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        group_saliency(**arguments)


@pytest.mark.parametrize("field", ["grad", "out"])
def test_group_saliency_refuses_two_devices(device, field):
    tensors = {"grad": torch.ones(4, 6, device=device), "out": torch.zeros(4, device=device)}
    tensors[field] = tensors[field].to("meta")
    with pytest.raises(ValueError, match=f"{field} is on meta, weight on {device}"):
        group_saliency(torch.ones(4, 6, device=device), axis=0, group=1, **tensors)


# Identities that hold in exact arithmetic, and need no second implementation.


def swiglu_and_attention(groups: int, heads: int, head: int, width: int, hidden: int, tokens: int):
    """Weights of a random block in float64 with gradients of a random objective, and the input of down_proj."""
    generator = torch.Generator().manual_seed(30)

    def random_weight(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator).div_(shape[-1] ** 0.5).requires_grad_()

    names = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    names |= {"q": (groups * heads * head, hidden), "k": (groups * head, hidden), "v": (groups * head, hidden)}
    names |= {"o": (hidden, groups * heads * head)}
    weight = {name: random_weight(*shape) for name, shape in names.items()}
    x = torch.randn(tokens, hidden, dtype=torch.float64, generator=generator)
    query = (x @ weight["q"].T).view(tokens, groups, heads, head)
    key, value = ((x @ weight[name].T).view(tokens, groups, head) for name in ("k", "v"))
    angle = torch.arange(tokens).double()[:, None] / 10.0 ** torch.arange(head // 2)
    query = torch.view_as_real(
        torch.view_as_complex(query.unflatten(-1, (-1, 2))) * torch.exp(1j * angle)[:, None, None]
    )
    key = torch.view_as_real(torch.view_as_complex(key.unflatten(-1, (-1, 2))) * torch.exp(1j * angle)[:, None])
    scores = torch.einsum("sghd,tgd->ghst", query.flatten(-2), key.flatten(-2)).div(head**0.5)
    scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf)
    mixed = torch.einsum("ghst,tgd->sghd", scores.softmax(-1), value).reshape(tokens, -1)
    x = x + mixed @ weight["o"].T
    activation = torch.nn.functional.silu(x @ weight["gate"].T) * (x @ weight["up"].T)
    activation.retain_grad()
    x = x + activation @ weight["down"].T
    (x * torch.randn(x.shape, dtype=torch.float64, generator=generator)).sum().backward()
    return weight, activation


def test_signed_sums_of_a_block_agree_with_each_other(device):
    """Scaling a neuron or a head by 1 + e through either of its matrices is the same change to first order."""
    groups, heads, head, width = 3, 2, 8, 50
    weight, activation = swiglu_and_attention(groups, heads, head, width, hidden=24, tokens=17)
    inputs = {name: (w.detach().float().to(device), w.grad.float().to(device)) for name, w in weight.items()}

    def signed(name: str, axis: int, group: int) -> Tensor:
        return group_saliency(*inputs[name], axis=axis, group=group, statistics="signed")

    def size(name: str, axis: int, group: int) -> Tensor:
        return group_saliency(*inputs[name], axis=axis, group=group, statistics="taylor")

    pairs = [
        (("up", 0, 1), ("down", 1, 1)),
        (("v", 0, head), ("o", 1, heads * head)),
        (("q", 0, heads * head), ("k", 0, head)),
    ]
    for first, second in pairs:
        # W and G are rounded to fp32 here: 2^-24 of every term, twice.
        bound = 2e-7 * (size(*first) + size(*second))
        assert ((signed(*first) - signed(*second)).abs() <= bound).all(), (first, second)
    assert not torch.allclose(signed("gate", 0, 1), signed("up", 0, 1), rtol=0.01)
    # The same from activations alone, without a gradient of any weight.
    tokens = activation.detach().float().to(device), activation.grad.float().to(device)
    of_activation = group_saliency(*tokens, axis=1, group=1, statistics="signed")
    bound = 2e-7 * (size("up", 0, 1) + group_saliency(*tokens, axis=1, group=1))
    assert ((of_activation - signed("up", 0, 1)).abs() <= bound).all()


def test_group_saliency_adds_up_over_micro_batches_of_activations(device):
    """(activation, gradient of the activation) of two halves of the tokens, into one `out`."""
    activation, grad = draw((64, 20), torch.bfloat16, device, 31), draw((64, 20), torch.bfloat16, device, 32)
    out = torch.zeros(4, device=device)
    for half in (slice(0, 40), slice(40, 64)):
        group_saliency(activation[half], grad[half], axis=1, group=5, statistics="signed", out=out)
    assert_no_worse_than_eager(out, activation, grad, 1, 5, "signed")


# Many tensors at once.


def random_table(device: str, seed: int, rows: int, count: int = 24) -> list[SaliencyEntry]:
    """Entries of every kind: both axes, biases, all types, empty ones, views, some with the `out` of another."""
    dice = random.Random(seed)
    outs: dict[int, list[Tensor]] = {}
    entries = []
    for number in range(count):
        axis, group = dice.randrange(2), dice.choice([1, 1, 2, 5])
        units = dice.choice([0, 1, 3, 3, 20, 20, 64])
        other = dice.choice([0, 1, 7, 33, 130, 1030])
        shape = [units * group, other] if axis == 0 else [other, units * group]
        types = dice.choice(MIXES)
        weight, grad = (draw(tuple(shape), dtype, device, seed + number) for dtype in types)
        if dice.random() < 0.2:
            axis, weight, grad = 0, *(draw((units * group,), dtype, device, seed - number) for dtype in types)
        elif dice.random() < 0.3:
            weight, grad = weight.T.contiguous().T, torch.cat([grad, grad], dim=1)[:, : shape[1]]
        known = outs.setdefault(units, [])
        if not known or dice.random() < 0.5:
            out_shape = (units,) if rows == 0 else (rows, units)
            known.append(draw(out_shape, torch.float32, device, 1000 + number))
        entries.append(SaliencyEntry(weight, grad, axis, group, dice.choice(known)))
    return entries


@pytest.mark.parametrize("statistics", ["taylor", "signed", ["ntk"], ["taylor", "fisher", "magnitude"], ALL], ids=str)
@pytest.mark.parametrize("seed", range(40, 46))
def test_foreach_gives_the_bits_of_single_calls(device, statistics, seed):
    rows = 0 if isinstance(statistics, str) else len(statistics)
    ours, singles = random_table(device, seed, rows), random_table(device, seed, rows)
    foreach_group_saliency(ours, statistics=statistics)
    for weight, grad, axis, group, out in singles:
        group_saliency(weight, grad, axis=axis, group=group, statistics=statistics, out=out)
    for number, (mine, theirs) in enumerate(zip(ours, singles, strict=True)):
        assert torch.equal(mine.out, theirs.out), f"entry {number}"


@pytest.mark.usefixtures("sized", "restored_threads")
def test_foreach_gives_the_bits_of_single_calls_for_large_matrices_beside_small_ones(device):
    shapes = [(1030, 3000), (3, 5), (2000, 1030), (1, 1030), (700, 1030), (0, 1030), (1030, 1)]
    matrices = [(draw(s, torch.bfloat16, device, 50), draw(s, torch.float32, device, 51)) for s in shapes]
    axes = [0, 0, 1, 1, 1, 1, 0]
    sizes = [matrix[0].shape[axis] for matrix, axis in zip(matrices, axes, strict=True)]
    expected = {size: torch.zeros(size, device=device) for size in sizes}
    for (weight, grad), axis, size in zip(matrices, axes, sizes, strict=True):
        group_saliency(weight, grad, axis=axis, group=1, out=expected[size])
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        ours = {size: torch.zeros(size, device=device) for size in sizes}
        entries = zip(matrices, axes, sizes, strict=True)
        foreach_group_saliency([SaliencyEntry(w, g, axis, 1, ours[size]) for (w, g), axis, size in entries])
        for size in ours:
            assert torch.equal(ours[size], expected[size])


@pytest.mark.parametrize("view", [False, True])
def test_foreach_adds_to_a_shared_out_in_the_order_of_the_table(device, view):
    """1e8 + 1 - 1e8 is 0 in fp32 and 1e8 - 1e8 + 1 is 1: the order shows."""
    big, one = torch.full((3, 1), 1e8, device=device), torch.ones(3, 1, device=device)
    for weights, expected in (((big, one, -big), 0.0), ((big, -big, one), 1.0), ((one, big, -big), 0.0)):
        out = torch.zeros(3, device=device)
        entries = [SaliencyEntry(w, one, 0, 1, out[:] if view else out) for w in weights]
        foreach_group_saliency(entries, statistics="signed")
        assert out.tolist() == [expected] * 3


def test_foreach_of_nothing(device):
    foreach_group_saliency([])
    foreach_group_saliency([], statistics=ALL)
    weight, out = torch.ones(0, 4, device=device), torch.full((4,), 5.0, device=device)
    foreach_group_saliency([SaliencyEntry(weight, weight, 1, 1, out)])
    assert out.tolist() == [5.0] * 4


def test_foreach_without_gradients(device):
    weights = [draw((4, 6), dtype, device, 52) for dtype in DTYPES]
    outs = [torch.zeros(2, 6, device=device) for _ in weights]
    entries = [SaliencyEntry(w, None, 1, 1, out) for w, out in zip(weights, outs, strict=True)]
    foreach_group_saliency(entries, statistics=["magnitude", "squared"])
    for weight, out in zip(weights, outs, strict=True):
        assert torch.equal(out, group_saliency(weight, None, axis=1, group=1, statistics=["magnitude", "squared"]))


def test_foreach_with_and_without_gradients_in_one_table(device):
    weight, grad = draw((4, 6), torch.float32, device, 53), torch.full((4, 6), torch.nan, device=device)
    outs = [torch.zeros(6, device=device) for _ in range(3)]
    entries = [SaliencyEntry(weight, g, 1, 1, out) for g, out in zip((grad, None, weight), outs, strict=True)]
    foreach_group_saliency(entries, statistics="squared")
    for out in outs:
        assert torch.equal(out, group_saliency(weight, None, axis=1, group=1, statistics="squared"))


@pytest.mark.parametrize(
    ("change", "statistics", "message"),
    [
        ({"grad": torch.ones(4, 5)}, "taylor", "entry 2: grad has shape [4, 5], weight [4, 6]"),
        ({"grad": None}, "taylor", "entry 2: grad is None"),
        ({"axis": 2}, "taylor", "entry 2: axis 2"),
        ({"group": 4}, "taylor", "entry 2: units of 4 do not divide axis 1 of length 6"),
        ({"weight": torch.ones(4, 6, dtype=torch.int32)}, "taylor", "entry 2: weight is torch.int32"),
        ({"out": torch.zeros(5)}, "taylor", "entry 2: out is torch.float32 [5], it must be torch.float32 [6]"),
        ({"out": torch.zeros(6, dtype=torch.float64)}, "taylor", "entry 2: out is torch.float64"),
        ({"out": torch.zeros(12)[::2]}, "taylor", "entry 2: out must be contiguous"),
        ({}, ["taylor"], "entry 0: out is torch.float32 [6], it must be torch.float32 [1, 6]"),
        ({}, ["ntk", "taylor"], "must stand in the order taylor, signed, ntk"),
    ],
)
def test_foreach_refuses(device, change, statistics, message):
    good = SaliencyEntry(*(torch.ones(4, 6, device=device) for _ in range(2)), 1, 1, torch.zeros(6, device=device))
    change = {k: v.to(device) if isinstance(v, torch.Tensor) and v.is_contiguous() else v for k, v in change.items()}
    if "out" in change and not change["out"].is_contiguous():
        change["out"] = torch.zeros(12, device=device)[::2]
    with pytest.raises(ValueError, match=re.escape(message)):
        foreach_group_saliency([good, good, good._replace(**change), good], statistics=statistics)
    assert not good.out.any(), "a refused call must not have written"


def test_foreach_refuses_two_devices(device):
    good = SaliencyEntry(*(torch.ones(4, 6, device=device) for _ in range(2)), 1, 1, torch.zeros(6, device=device))
    bad = SaliencyEntry(*(torch.ones(4, 6, device="meta") for _ in range(2)), 1, 1, torch.zeros(6, device="meta"))
    with pytest.raises(ValueError, match=f"entry 1: weight is on meta, that of entry 0 on {device}"):
        foreach_group_saliency([good, bad])


# Plans.


def planned_table(device: str, seed: int, rows: int) -> list[SaliencyEntry]:
    """As `random_table`, with tensors that are read where they lie."""
    entries = random_table(device, seed, rows)
    copy = {"memory_format": torch.contiguous_format}
    return [e._replace(weight=e.weight.clone(**copy), grad=e.grad.clone(**copy)) for e in entries]


@pytest.mark.parametrize("statistics", ["taylor", ["ntk"], ["magnitude", "squared"], ALL], ids=str)
@pytest.mark.parametrize("seed", range(80, 84))
def test_a_plan_gives_the_bits_of_foreach_each_time(device, statistics, seed):
    rows = 0 if isinstance(statistics, str) else len(statistics)
    ours, expected = planned_table(device, seed, rows), planned_table(device, seed, rows)
    plan = plan_group_saliency(ours, statistics=statistics)
    assert all(torch.equal(e.out, other.out) for e, other in zip(ours, expected, strict=True)), "nothing is added yet"
    for round_ in range(3):
        plan()
        foreach_group_saliency(expected, statistics=statistics)
        for number, (mine, theirs) in enumerate(zip(ours, expected, strict=True)):
            assert torch.equal(mine.out, theirs.out), f"round {round_}, entry {number}"
        for entry in (*ours, *expected):  # read anew by the next call
            entry.weight.mul_(-0.75)
            entry.grad.add_(round_)


@pytest.mark.parametrize("statistics", ["taylor", ["fisher", "squared"]], ids=str)
@pytest.mark.parametrize("seed", range(90, 93))
@pytest.mark.parametrize("count", [1, 24])
def test_a_plan_takes_other_gradients(device, statistics, seed, count):
    rows = 0 if isinstance(statistics, str) else len(statistics)
    ours, expected = (planned_table(device, seed, rows)[-count:] for _ in range(2))
    plan = plan_group_saliency(ours, statistics=statistics)
    grads = None
    for offset in (0, 1, 8, None):  # elements: another alignment, the first one again, and no new gradients
        if offset is not None:
            grads = []
            for number, entry in enumerate(ours):
                memory = draw((entry.grad.numel() + 8,), entry.grad.dtype, device, 7 * number + offset)
                grads.append(memory[offset : offset + entry.grad.numel()].view(entry.grad.shape))
        plan(grads=None if offset is None else grads)
        foreach_group_saliency(
            [entry._replace(grad=grad) for entry, grad in zip(expected, grads, strict=True)], statistics=statistics
        )
        for number, (mine, theirs) in enumerate(zip(ours, expected, strict=True)):
            assert torch.equal(mine.out, theirs.out), f"offset {offset}, entry {number}"


def test_a_plan_holds_its_memory(device):
    """Whatever becomes of the tensors: parameters that are given other memory, gradients that are dropped."""
    weight, grad = (nn.Parameter(draw((64, 48), torch.float32, device, seed)) for seed in (94, 95))
    out, sums = torch.zeros(64, device=device), group_saliency(weight, grad, axis=0, group=1)
    plan = plan_group_saliency([SaliencyEntry(weight, grad, 0, 1, out)] * 2)
    weight.data, grad.data = torch.empty(1, device=device), torch.empty(1, device=device)
    plan()
    assert torch.equal(out, sums + sums)
    assert not out.requires_grad
    other = draw((64, 48), torch.float32, device, 96)
    plan(grads=[other.clone(), other.clone()])
    memory = [torch.full((64, 48), torch.nan, device=device) for _ in range(4)]
    plan()
    assert out.isfinite().all()
    del memory


def test_a_plan_lets_go_of_gradients_that_others_have_replaced():
    class Memory(bytearray):
        """Unlike tensors, whose aliases live on, it can tell."""

    weight, other, out = torch.ones(6, 8), torch.ones(6, 8), torch.zeros(6)
    memory = Memory(weight.nbytes)
    alive = weakref.ref(memory)
    grad = torch.frombuffer(memory, dtype=torch.float32).view(6, 8)
    plan = plan_group_saliency([SaliencyEntry(weight, grad, 0, 1, out)] * 2)
    del grad, memory
    assert alive() is not None
    plan(grads=[other, other])
    assert alive() is None
    plan()
    assert out.tolist() == [32.0] * 6


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_plan_is_not_copied(device, copied):
    """A copy would write to the memory of the first one, in another process to anyone's."""
    one, out = torch.ones(4, 6, device=device), torch.zeros(6, device=device)
    plan = plan_group_saliency([SaliencyEntry(one, one, 1, 1, out)])
    with pytest.raises(TypeError, match="cannot be copied or pickled: make another one of the same entries"):
        copied(plan)


def test_entries_may_come_from_an_iterator(device):
    one, outs = torch.ones(4, 6, device=device), [torch.zeros(6, device=device) for _ in range(2)]
    plan_group_saliency(SaliencyEntry(one, one, 1, 1, out) for out in outs)()
    foreach_group_saliency(SaliencyEntry(one, one, 1, 1, out) for out in outs)
    assert all(out.tolist() == [8.0] * 6 for out in outs)


def test_a_plan_made_in_inference_mode_takes_gradients_outside(device):
    one, outs = torch.ones(4, 6, device=device), [torch.zeros(6, device=device) for _ in range(2)]
    with torch.inference_mode():
        plan = plan_group_saliency([SaliencyEntry(one, one, 1, 1, out) for out in outs])
    plan(grads=[one + one, one + one])
    assert all(out.tolist() == [8.0] * 6 for out in outs)


def test_a_plan_of_nothing(device):
    plan_group_saliency([])()
    plan_group_saliency([])(grads=[])
    empty, full = torch.ones(0, 4, device=device), torch.ones(2, 4, device=device)
    out = torch.full((4,), 5.0, device=device)
    plan = plan_group_saliency([SaliencyEntry(empty, empty, 1, 1, out)])
    plan()
    plan(grads=[empty.clone()])
    assert out.tolist() == [5.0] * 4
    plan = plan_group_saliency([SaliencyEntry(one, one, 1, 1, out) for one in (empty, full, empty)])
    plan(grads=[empty, full * 2, empty])
    assert out.tolist() == [9.0] * 4


def test_a_plan_without_gradients(device):
    weight = draw((6, 8), torch.bfloat16, device, 97)
    outs = [torch.zeros(8, device=device) for _ in range(2)]
    plan = plan_group_saliency([SaliencyEntry(weight, None, 1, 1, out) for out in outs], statistics="squared")
    plan()
    plan(grads=[None, None])
    expected = group_saliency(weight, None, axis=1, group=1, statistics="squared")
    assert all(torch.equal(out, expected + expected) for out in outs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(4, 6, dtype=torch.float64)}, "entry 1: weight is torch.float64, not torch.float32"),
        ({"grad": torch.ones(6, 4).T}, "entry 1: grad is not contiguous in its last dimension"),
        (
            {"grad": torch._neg_view(torch.ones(4, 6))},
            "entry 1: grad is not contiguous in its last dimension, or lazily",
        ),
        ({"grad": torch.ones(4, 5)}, "entry 1: grad has shape [4, 5], weight [4, 6]"),
        ({"out": torch.zeros(5)}, "entry 1: out is torch.float32 [5], it must be torch.float32 [6]"),
    ],
)
def test_a_plan_refuses(device, change, message):
    good = SaliencyEntry(*(torch.ones(4, 6, device=device) for _ in range(2)), 1, 1, torch.zeros(6, device=device))
    if device != "cpu":
        pytest.skip("said before a backend is asked")
    with pytest.raises(ValueError, match=re.escape(message)):
        plan_group_saliency([good, good._replace(**change)])


def test_a_plan_refuses_outs_that_overlap(device):
    one, memory = torch.ones(4, 6, device=device), torch.zeros(8, device=device)
    with pytest.raises(ValueError, match="overlap without being the same"):
        plan_group_saliency([SaliencyEntry(one, one, 1, 1, memory[start : start + 6]) for start in (0, 2)])


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ([torch.ones(4, 6)], "1 gradients for a plan of 2 entries: give one an entry"),
        ([torch.ones(4, 6), None], "entry 1: grad is None, the plan was made for torch.float32 [4, 6]"),
        (
            [torch.ones(4, 6), torch.ones(4, 5)],
            "entry 1: grad is torch.float32 [4, 5] of strides [5, 1] on cpu, the plan",
        ),
        ([torch.ones(4, 6).half(), torch.ones(4, 6)], "entry 0: grad is torch.float16 [4, 6]"),
        ([torch.ones(6, 4).T, torch.ones(4, 6)], "entry 0: grad is torch.float32 [4, 6] of strides [1, 4]"),
        (
            [torch.ones(4, 6, device="meta"), torch.ones(4, 6)],
            "entry 0: grad is torch.float32 [4, 6] of strides [6, 1] on m",
        ),
    ],
)
def test_a_plan_refuses_gradients(device, grads, message):
    if device != "cpu":
        pytest.skip("said before a backend is asked")
    outs = [torch.zeros(6), torch.zeros(6)]
    plan = plan_group_saliency([SaliencyEntry(torch.ones(4, 6), torch.ones(4, 6), 1, 1, out) for out in outs])
    with pytest.raises(ValueError, match=re.escape(message)):
        plan(grads=grads)
    assert not any(out.any() for out in outs), "a refused call must not have written"


# Equal bits.


@pytest.mark.usefixtures("sized", "restored_threads")
@pytest.mark.parametrize(
    ("shape", "group"),
    [((515, 2051), 1), ((130, 20_000), 2), ((20_000, 65), 5), ((50, 50), 10), ((2, 7), 1)],
    ids=str,
)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("types", [(torch.float32, torch.float32), (torch.bfloat16, torch.float16)], ids=short)
def test_bits_depend_neither_on_the_run_nor_on_the_threads(device, shape, group, axis, types):
    shape = tuple(length - length % group if axis == index else length for index, length in enumerate(shape))
    weight, grad = draw(shape, types[0], device, 60), draw(shape, types[1], device, 61)
    results = []
    for threads in (1, 1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(group_saliency(weight, grad, axis=axis, group=group, statistics=ALL))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.usefixtures("sized", "restored_threads")
@pytest.mark.parametrize(
    ("shape", "axis", "group"),
    [((1, 70_001), 0, 1), ((70_001, 1), 1, 1), ((70_001,), 0, 70_001), ((3, 70_001), 1, 70_001)],
    ids=str,
)
def test_bits_of_one_long_sum_do_not_depend_on_the_threads(device, shape, axis, group):
    """A single unit is where an implementation is tempted to split the sum itself between threads."""
    weight, grad = draw(shape, torch.float32, device, 62), draw(shape, torch.float32, device, 63)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(group_saliency(weight, grad, axis=axis, group=group, statistics=ALL))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("axis", [0, 1])
def test_bits_do_not_depend_on_the_place_in_memory(device, axis):
    """Same numbers, another alignment and another row stride."""
    values = [draw((33, 75), dtype, device, 64) for dtype in (torch.bfloat16, torch.float32)]
    expected = group_saliency(*values, axis=axis, group=1, statistics=ALL)
    for offset, padding in ((1, 0), (3, 5), (7, 2)):
        moved = []
        for value in values:
            wide = torch.zeros((33, 75 + offset + padding), dtype=value.dtype, device=device)
            moved.append(wide[:, offset : offset + 75].copy_(value))
        assert torch.equal(group_saliency(*moved, axis=axis, group=1, statistics=ALL), expected)


# Large matrices that take no memory.


@NEEDS_KERNELS
@pytest.mark.parametrize(("device", "backend"), KERNELS, ids=map("-".join, KERNELS))
@pytest.mark.parametrize("axis", [0, 1])
def test_more_than_two_to_the_31_elements(device, backend, axis):
    """One row 33 000 times: every sum over columns is that of the row, every sum over rows 33 000 times a term."""
    rows, columns = 33_000, 65_536
    row = draw((1, columns), torch.bfloat16, device, 70), draw((1, columns), torch.bfloat16, device, 71)
    weight, grad = (tensor.expand(rows, columns) for tensor in row)
    assert weight.numel() > 2**31
    with use_backend(backend):
        ours = group_saliency(weight, grad, axis=axis, group=1)
    terms = (row[0].double() * row[1].double()).abs()[0]
    exact = terms.sum().expand(rows) if axis == 0 else terms * rows
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("axis", [0, 1])
def test_rows_more_than_two_to_the_31_elements_apart(device, axis):
    """Memory that nobody touches costs a CPU nothing."""
    stride = 2**31 // 3 + 5
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 8 * stride:
        pytest.skip("needs 6 GB on the GPU")
    weight = torch.empty(3 * stride + 40, dtype=torch.bfloat16, device=device).as_strided((4, 40), (stride, 1))
    weight.copy_(draw((4, 40), torch.bfloat16, device, 72))
    grad = draw((4, 40), torch.float32, device, 73)
    ours = group_saliency(weight, grad, axis=axis, group=2)
    assert torch.equal(ours, group_saliency(weight.contiguous(), grad, axis=axis, group=2))


@NEEDS_KERNELS
@pytest.mark.parametrize(("device", "backend"), KERNELS, ids=map("-".join, KERNELS))
@pytest.mark.parametrize("axis", [0, 1])
def test_no_temporary_of_the_size_of_a_matrix(device, backend, axis):
    """34 MB each; eager makes two fp32 copies of them and a product, 67 MB each."""
    weight, grad = (draw((4096, 4096), torch.bfloat16, device, seed) for seed in (74, 75))
    with use_backend(backend):
        group_saliency(weight[:64], grad[:64], axis=axis, group=1)
        assert peak_growth(device, lambda: group_saliency(weight, grad, axis=axis, group=1, statistics=ALL)) < 8e6
    with use_backend("torch"):
        assert peak_growth(device, lambda: group_saliency(weight, grad, axis=axis, group=1)) > 60e6
