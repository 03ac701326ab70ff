"""Both passes of the saliency kernels against float64, and what a table must not change."""

from __future__ import annotations

import itertools

import pytest
import torch
from operators import DTYPES, draw, short
from torch import Tensor

from nirvana.errors import NirvanaError
from nirvana.kernels import config, saliency, table
from nirvana.kernels.table import Table
from nirvana.ops import STATISTICS, SaliencyEntry, foreach_group_saliency, group_saliency, plan_group_saliency
from nirvana.ops.backends import Matrices

ALL = list(STATISTICS)
TERMS = {
    "taylor": lambda w, g: (g * w).abs(),
    "signed": lambda w, g: g * w,
    "ntk": lambda w, g: g.abs(),
    "fisher": lambda w, g: (g * w) ** 2,
    "magnitude": lambda w, g: w.abs(),
    "squared": lambda w, g: w**2,
}
MIXES = list(itertools.product(DTYPES, DTYPES))


def sums(terms: Tensor, axis: int, group: int) -> Tensor:
    return terms.sum(dim=1 - axis).view(-1, group).sum(dim=1)


def assert_no_worse_than_eager(ours, weight, grad, axis: int, group: int, names=ALL) -> None:
    """Of the same formula in fp32. Three roundings are 1.8e-7 of a sum: eager's error may be 0 by luck."""
    for row, name in zip(ours, names, strict=True):
        exact = sums(TERMS[name](weight.double(), grad.double()), axis, group)
        size = sums(TERMS[name](weight.double(), grad.double()).abs(), axis, group)
        eager = sums(TERMS[name](weight.float(), grad.float()), axis, group)
        assert row.shape == exact.shape
        assert ((row - exact).abs() <= (eager - exact).abs() + 2e-7 * size).all(), name


def both(shape, types, seed: int) -> tuple[Tensor, Tensor]:
    return draw(shape, types[0], "cpu", seed), draw(shape, types[1], "cpu", seed + 1)


@pytest.fixture
def long_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs take as many blocks as they may, which is for matrices too large for the interpreter."""
    monkeypatch.setattr(config, "FILLING", 0)


@pytest.fixture
def short_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saliency, "SEARCH", 2)


@pytest.mark.parametrize("types", MIXES, ids=short)
@pytest.mark.parametrize(("shape", "axis", "group"), [((36, 259), 0, 12), ((13, 80), 1, 1)], ids=str)
def test_all_statistics_of_all_types(types, shape, axis, group):
    weight, grad = both(shape, types, 0)
    ours = group_saliency(weight, grad, axis=axis, group=group, statistics=ALL)
    assert_no_worse_than_eager(ours, weight, grad, axis, group)


@pytest.mark.parametrize("statistics", [*ALL, ["taylor", "ntk"], ["ntk", "fisher", "magnitude"]], ids=str)
@pytest.mark.parametrize("axis", [0, 1])
def test_statistics_in_any_company(statistics, axis):
    names = [statistics] if isinstance(statistics, str) else statistics
    weight, grad = both((15, 48), (torch.bfloat16, torch.float16), 2)
    ours = group_saliency(weight, grad, axis=axis, group=1, statistics=statistics)
    ours = ours[None] if isinstance(statistics, str) else ours
    assert_no_worse_than_eager(ours, weight, grad, axis, 1, names)


@pytest.mark.usefixtures("long_spans")
@pytest.mark.parametrize("names", [["taylor"], ALL], ids=["one", "six"])
@pytest.mark.parametrize(
    ("shape", "axis", "group"),
    [((19, 1024 + 300), 0, 1), ((7, 2049), 0, 7), ((300, 70), 1, 1), ((129, 257), 1, 257), ((600, 3), 1, 1)],
    ids=str,
)
def test_programs_of_many_blocks(names, shape, axis, group):
    weight, grad = both(shape, (torch.float32, torch.bfloat16), 4)
    ours = group_saliency(weight, grad, axis=axis, group=group, statistics=names)
    assert_no_worse_than_eager(ours, weight, grad, axis, group, names)


@pytest.mark.parametrize("axis", [0, 1])
def test_more_splits_than_a_block_of_them(axis):
    """Each of 40 partial sums of a unit is one block of the matrix."""
    shape = (2, 40 * 256) if axis == 0 else (40 * 16, 2)
    weight, grad = both(shape, (torch.float32, torch.float32), 6)
    ours = group_saliency(weight, grad, axis=axis, group=1)
    assert_no_worse_than_eager([ours], weight, grad, axis, 1, ["taylor"])


def halves(terms: Tensor) -> Tensor:
    """The lower half of the rows is added to the upper one until one is left."""
    while len(terms) > 1:
        terms = terms[: len(terms) // 2] + terms[len(terms) // 2 :]
    return terms[0]


def neighbours(terms: Tensor) -> Tensor:
    while terms.shape[1] > 1:
        terms = terms[:, 0::2] + terms[:, 1::2]
    return terms[:, 0]


def test_order_of_sums():
    """The source fixes it, so these are the bits of every GPU: 2 blocks of 16 x 256, summed over columns and rows."""
    chosen = config.SaliencyConfig.of(1)
    rows, columns = chosen.block_rows, chosen.block_columns
    weight, grad = both((rows, 2 * columns), (torch.float32, torch.float32), 70)
    terms = (weight * grad).abs()
    left, right = neighbours(terms[:, :columns]).double(), neighbours(terms[:, columns:]).double()
    assert torch.equal(group_saliency(weight, grad, axis=0, group=1), (left + right).float())
    weight, grad = both((2 * rows, columns), (torch.bfloat16, torch.float32), 72)
    terms = (weight.float() * grad).abs()
    upper, lower = halves(terms[:rows]).double(), halves(terms[rows:]).double()
    assert torch.equal(group_saliency(weight, grad, axis=1, group=1), (upper + lower).float())


@pytest.mark.parametrize("axis", [0, 1])
def test_order_of_sums_in_groups(axis):
    """Neighbours of one unit are folded before they leave a tile: 4 of a unit of 12 here."""
    shape = (24, 40) if axis == 0 else (40, 24)
    weight, grad = both(shape, (torch.float32, torch.bfloat16), 74)
    terms = (weight * grad.float()).abs()
    padded = torch.zeros((32, 256) if axis == 0 else (48, 32))
    padded[: shape[0], : shape[1]] = terms
    blocks = padded.split(16)
    if axis == 0:
        sums = torch.cat([neighbours(block) for block in blocks])[:24]
    else:
        sums = torch.stack([halves(block) for block in blocks])[:, :24]
    folded = neighbours(sums.reshape(-1, 4)).double().view(*sums.shape[:-1], 6)
    folded = folded.sum(0) if axis == 1 else folded
    expected = folded.view(2, 3).sum(1).float()
    assert torch.equal(group_saliency(weight, grad, axis=axis, group=12), expected)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("group", [2, 4, 16, 48, 64, 192, 256, 384, 768])
@pytest.mark.parametrize("names", [["taylor"], ALL], ids=["one", "six"])
def test_groups_of_any_size(axis, group, names):
    units = max(1, 400 // group)
    shape = (units * group, 70) if axis == 0 else (37, units * group)
    weight, grad = both(shape, (torch.bfloat16, torch.float32), 76)
    ours = group_saliency(weight, grad, axis=axis, group=group, statistics=names)
    assert_no_worse_than_eager(ours, weight, grad, axis, group, names)


@pytest.mark.parametrize("statistics", [1, 6])
def test_positions_are_cut_by_neither_tiles_nor_groups(statistics):
    chosen = config.SaliencyConfig.of(statistics)
    for axis, block in ((0, chosen.block_rows), (1, chosen.block_columns)):
        for group in range(1, 600):
            position = 1 << chosen.levels(axis, group)
            assert group % position == 0
            assert block % position == 0
            assert position == block or group % (2 * position), "the most"


def test_one_matrix_takes_no_table(monkeypatch):
    """Its numbers are arguments: nothing is copied to a GPU, and a CUDA graph may be captured."""
    monkeypatch.setattr(Table, "to", lambda *_: pytest.fail("a table was copied"))
    weight, grad = both((20, 50), (torch.bfloat16, torch.float32), 78)
    ours = group_saliency(weight, grad, axis=0, group=5)
    assert_no_worse_than_eager([ours], weight, grad, 0, 5, ["taylor"])


@pytest.mark.usefixtures("short_search")
@pytest.mark.parametrize("names", [["taylor"], ["squared"], ALL], ids=["taylor", "squared", "six"])
def test_a_plan_has_the_bits_of_a_table(names):
    """Also with other gradients, in the same places of the table, or of another alignment, which go elsewhere."""
    ours, theirs = ([torch.zeros(len(names), units) for units in (15, 2, 4)] for _ in range(2))
    entries = [SaliencyEntry(weight, grad, axis, group, ours[out]) for weight, grad, axis, group, out in model()]
    plan = plan_group_saliency(entries, statistics=names)
    start = [entry.grad for entry in entries]
    aligned = [2 * grad for grad in start]
    shifted = [torch.cat([grad.flatten(), grad.flatten()[:1]])[1:].view(grad.shape) for grad in start]
    assert any((one.data_ptr() ^ other.data_ptr()) % 16 for one, other in zip(start, shifted, strict=True))
    for given, read in ((None, start), (aligned, aligned), (shifted, shifted), (None, shifted), (start, start)):
        plan(grads=given)
        table = [
            entry._replace(grad=grad, out=theirs[out])
            for entry, grad, (*_, out) in zip(entries, read, model(), strict=True)
        ]
        foreach_group_saliency(table, statistics=names)
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_a_refused_upload_leaves_a_plan_as_it_was(monkeypatch):
    """While a graph is captured gradients of another alignment need another table."""
    entries = [SaliencyEntry(*both((16, 32), MIXES[0], seed), 0, 1, torch.zeros(16)) for seed in (40, 42)]
    others = [draw((16 * 32 + 1,), torch.float32, "cpu", seed)[1:].view(16, 32) for seed in (44, 45)]
    plan = plan_group_saliency(entries)

    def refuse(values, device):
        raise NirvanaError("captured")

    with monkeypatch.context() as patch:
        for module in (saliency, table):
            patch.setattr(module, "upload", refuse)
        with pytest.raises(NirvanaError):
            plan(grads=others)
    for grads in (None, others):
        expected = [
            group_saliency(entry.weight, grad, axis=0, group=1, out=entry.out.clone())
            for entry, grad in zip(entries, grads or [entry.grad for entry in entries], strict=True)
        ]
        plan(grads=grads)
        assert all(torch.equal(entry.out, sums) for entry, sums in zip(entries, expected, strict=True))
    # The interpreter reads any address: a GPU would not read these with what was compiled for the first ones.
    assert not plan._run._launches[0].options["ALIGNED"]


@pytest.mark.parametrize("length", [1, 37, 300])
def test_bias(length):
    weight, grad = both((length,), (torch.bfloat16, torch.float32), 8)
    ours = group_saliency(weight, grad, axis=0, group=length, statistics=ALL)
    assert_no_worse_than_eager(ours, weight[None], grad[None], 1, length)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_rows_lie_apart_among_nan(axis, aligned):
    """Nothing beside the matrix is read, and nothing beside the output is written."""
    weight, grad = both((18, 256 + 48), (torch.float16, torch.float32), 10)
    columns = slice(16, 16 + 304) if aligned else slice(3, 3 + 304)
    frames = [torch.full((40, 352), torch.nan, dtype=one.dtype) for one in (weight, grad)]
    views = [frame[1:37:2, columns] for frame in frames]
    for view, one in zip(views, (weight, grad), strict=True):
        view.copy_(one)
    assert all(saliency._aligned(view.data_ptr(), view.stride(0), len(view)) == aligned for view in views)
    buffer = torch.full((len(ALL) + 2, 18 if axis == 0 else 304), 7.0)
    out = buffer[1:-1]
    out.zero_()
    group_saliency(*views, axis=axis, group=1, statistics=ALL, out=out)
    assert_no_worse_than_eager(out, weight, grad, axis, 1)
    assert (buffer[0] == 7).all()
    assert (buffer[-1] == 7).all()


@pytest.mark.parametrize("axis", [0, 1])
def test_repeated_rows(axis):
    weight, grad = draw((1, 48), torch.float32, "cpu", 12).expand(20, 48), draw((20, 48), torch.bfloat16, "cpu", 13)
    ours = group_saliency(weight, grad, axis=axis, group=1, statistics=ALL)
    assert_no_worse_than_eager(ours, weight, grad, axis, 1)


def test_rows_more_than_two_to_the_31_elements_apart():
    """Memory that nobody touches costs nothing."""
    stride = 2**31 // 3 + 5
    weight = torch.empty(3 * stride + 40, dtype=torch.bfloat16).as_strided((4, 40), (stride, 1))
    weight.copy_(draw((4, 40), torch.bfloat16, "cpu", 14))
    grad = draw((4, 40), torch.float32, "cpu", 15)
    for axis in (0, 1):
        ours = group_saliency(weight, grad, axis=axis, group=2)
        assert torch.equal(ours, group_saliency(weight.contiguous()[:, :], grad, axis=axis, group=2))


def model() -> list[tuple[Tensor, Tensor, int, int, int]]:
    """(weight, grad, axis, group, output) of blocks as in a decoder, in several types, with a bias and an odd width."""
    shapes = [
        ((15, 64), 0, 1, 0),
        ((15, 64), 0, 1, 0),
        ((24, 15), 1, 1, 0),
        ((24, 63), 0, 12, 1),
        ((300,), 0, 150, 1),
        ((2, 63), 0, 1, 1),
        ((15,), 0, 1, 0),
        ((16, 64), 1, 16, 2),
    ]
    types = itertools.cycle([(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32,) * 2])
    return [
        (*both(shape, pair, 20 + 2 * number), axis, group, out)
        for number, ((shape, axis, group, out), pair) in enumerate(zip(shapes, types, strict=False))
    ]


@pytest.mark.usefixtures("short_search")
@pytest.mark.parametrize("names", ["taylor", ["taylor", "signed", "magnitude"]], ids=str)
def test_bits_of_a_table_are_those_of_single_calls(names):
    """Outputs 0 and 1 are shared, output 1 by units of several rows and of one."""
    rows = () if isinstance(names, str) else (len(names),)
    start = [draw((*rows, units), torch.float32, "cpu", 40) for units in (15, 2, 4)]
    single = [one.clone() for one in start]
    for weight, grad, axis, group, out in model():
        group_saliency(weight, grad, axis=axis, group=group, statistics=names, out=single[out])
    for _ in range(2):
        grouped = [one.clone() for one in start]
        entries = [SaliencyEntry(weight, grad, axis, group, grouped[out]) for weight, grad, axis, group, out in model()]
        foreach_group_saliency(entries, statistics=names)
        assert all(torch.equal(one, other) for one, other in zip(grouped, single, strict=True))


def test_a_table_takes_one_launch_a_pass(monkeypatch):
    """Whatever the shapes; one more of the first pass for each further pair of types or alignment."""
    grids = []

    class Counting:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            grids.append(grid)
            return self.kernel[grid]

    for name in ("_saliency_tiles_kernel", "saliency_totals_kernel"):
        monkeypatch.setattr(saliency, name, Counting(getattr(saliency, name)))
    ones = torch.ones(8, 64)
    table = [Matrices(ones, ones, 0, 1, torch.zeros(1, 8)), Matrices(ones, ones, 1, 8, torch.zeros(1, 8))]
    saliency.saliency([*table, Matrices(ones[:, :16], ones[:, 16:32], 0, 8, torch.zeros(1, 1))], 1)
    assert len(grids) == 2
    saliency.saliency([*table, Matrices(ones[:, 1:], ones[:, 1:], 0, 1, torch.zeros(1, 8))], 1)
    saliency.saliency([*table, Matrices(ones.half(), ones, 0, 1, torch.zeros(1, 8))], 1)
    assert len(grids) == 2 + 3 + 3


def test_nan_and_infinity():
    weight, grad = torch.ones(3, 4), torch.ones(3, 4)
    grad[0, 1], grad[2, 3] = torch.nan, -torch.inf
    taylor, signed, magnitude = group_saliency(
        weight, grad, axis=0, group=1, statistics=["taylor", "signed", "magnitude"]
    )
    assert taylor[0].isnan()
    assert taylor[1:].tolist() == [4.0, torch.inf]
    assert signed[1:].tolist() == [4.0, -torch.inf]
    assert magnitude.tolist() == [4.0] * 3


def test_weight_alone():
    weight = draw((20, 50), torch.bfloat16, "cpu", 60)
    ours = group_saliency(weight, None, axis=1, group=5, statistics=["magnitude", "squared"])
    assert_no_worse_than_eager(ours, weight, weight, 1, 5, ["magnitude", "squared"])


@pytest.mark.parametrize("count", range(1, 7))
@pytest.mark.parametrize(
    "shape", [(4096, 14336), (14336, 4096), (1024, 4096), (128256, 4096), (576, 1536), (1, 8), (64, 1)]
)
@pytest.mark.parametrize("axis", [0, 1])
def test_spans_fill_the_machine_with_few_partial_sums(count, shape, axis):
    """Of the 8B shapes each gives two programs a multiprocessor of an H100 or more; partials stay below 5 % of bf16."""
    chosen = config.SaliencyConfig.of(count)
    rows, columns = chosen.span(*shape, axis)
    assert rows % chosen.block_rows == 0
    assert columns % chosen.block_columns == 0
    assert columns % 16 == 0, "promised to the compiler"
    assert rows == chosen.block_rows or columns == chosen.block_columns
    if min(shape) >= 1024:
        programs = -(-shape[0] // rows) * -(-shape[1] // columns)
        assert programs >= 2 * 132
        partials = count * (columns if axis else rows) * programs
        assert 2 * 4 * partials <= 0.05 * 2 * 2 * shape[0] * shape[1] or programs < 2 * config.FILLING
