"""The mixture kernels against the reference in float64.

Bounds are scores of the row and components are counted, so results are equal or differ by a decision: EM that stops a
step apart, a score whose density is the threshold's. Of these rows none has one so close.
"""

from __future__ import annotations

import pytest
import torch
from operators import draw, equal_bits
from torch import Tensor

from nirvana.kernels import mixture as kernels
from nirvana.ops import MixtureBounds, mixture_bounds, use_backend

NAN, INF = torch.nan, torch.inf


def heavy_tails(units: int, length: int, seed: int = 0) -> Tensor:
    first, second, scale = (draw((units, length), torch.float32, "cpu", seed + i) for i in range(3))
    return first * second * scale[:, :1].exp() * 1e-6


def separated(components: int, length: int, seed: int = 0) -> Tensor:
    return draw((length,), torch.float32, "cpu", seed) + 20 * (torch.arange(length) % components)


def assert_as_reference(rows: Tensor, **options: float) -> MixtureBounds:
    with use_backend("torch"):
        exact = mixture_bounds(rows, **options)
    ours = mixture_bounds(rows, **options)
    assert all(map(equal_bits, ours, exact)), f"{ours} is not {exact}"
    return ours


@pytest.mark.parametrize(("units", "length", "most"), [(3, 31, 3), (1, 64, 3), (1, 35, 4), (2, 100, 2)])
def test_heavy_tails(units, length, most):
    assert_as_reference(heavy_tails(units, length, seed=length), max_components=most, density_fraction=0.1)


@pytest.mark.parametrize(("length", "most"), [(1061, 2), (4101, 1)])
def test_rows_of_many_steps(length, most):
    """More than 32 of a lane; from 4097 scores on by eight warps."""
    low, high, _ = assert_as_reference(heavy_tails(1, length, seed=length), max_components=most)
    assert low < high


def test_components_that_are_far_apart_are_found():
    rows = torch.stack([separated(components, 32, components) for components in (1, 5)])
    assert assert_as_reference(rows).components.tolist() == [1, 5]


@pytest.mark.parametrize("row", [[5.0], [1.0, 2.0], [2.0, -1.0, 7.0], [-1e38, 3e38, 1e-40], [0.1] * 33], ids=str)
def test_few_scores_and_constant_rows(row):
    low, high, components = assert_as_reference(torch.tensor([row]))
    assert (low.item(), high.item()) == (torch.tensor(min(row)).item(), torch.tensor(max(row)).item())
    assert 1 <= components.item() <= len(set(row))


def test_no_more_components_than_different_scores():
    rows = torch.tensor([[0.0, 1.0, 0.0] * 20, [0.0, 1.0, 5.0] * 20])
    assert assert_as_reference(rows).components.tolist() == [2, 3]


def test_outliers_of_the_lowest_density_are_cut_at_both_ends():
    row = torch.cat([torch.linspace(-1, 1, 40), torch.tensor([9.0, -9.0])])
    ours = assert_as_reference(row[None], max_components=1, density_fraction=0.05)
    assert (ours.low.item(), ours.high.item()) == (-1, 1)


def test_rows_that_are_not_finite_are_nan():
    rows = heavy_tails(5, 40)
    clean = mixture_bounds(rows, max_components=2)
    rows[1, 7], rows[2, 0], rows[3, 39] = NAN, INF, -INF
    low, high, components = mixture_bounds(rows, max_components=2)
    assert low.isnan().tolist() == high.isnan().tolist() == [False, True, True, True, False]
    assert components[1:4].tolist() == [0, 0, 0]
    for ours, before in zip((low, high, components), clean, strict=True):
        assert torch.equal(ours[::4], before[::4])


def test_bits_depend_neither_on_neighbours_nor_on_the_order(monkeypatch):
    rows = heavy_tails(2, 32, seed=4)
    expected = mixture_bounds(rows, max_components=2)
    shuffled = rows[:, torch.randperm(32, generator=torch.Generator().manual_seed(0))]
    assert all(map(equal_bits, mixture_bounds(shuffled, max_components=2), expected))
    monkeypatch.setattr(kernels, "AT_ONCE", 40)
    assert all(map(equal_bits, mixture_bounds(rows, max_components=2), expected))
