"""Products at a vocabulary head against float64; what a GPU does to half-precision operands runs here as well.

`nirvana.ops.head` tells its ways apart by the type of the operands, and `product` of two half-precision matrices on the
CPU is what tensor cores compute: exact products with fp32 sums. Only the choice is patched.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nirvana.architectures.inputs import IGNORE
from nirvana.ops import head
from nirvana.saliency.objectives import OBJECTIVES, Head, Totals

pytestmark = pytest.mark.usefixtures("one_thread")

TYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1, 1, 1), (3, 7, 71, 13), (2, 33, 300, 64))


def draw(*shape, seed, dtype):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(dtype)


@pytest.fixture
def on_tensor_cores(monkeypatch):
    """Half-precision operands stay as they are, as on a GPU."""
    monkeypatch.setattr(head, "tensor_cores", lambda hidden, weight: weight.dtype in head._HALF)


def worst(found, truth) -> float:
    return float((found.double() - truth).abs().max())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_logits(shape, dtype, on_tensor_cores):
    examples, positions, words, size = shape
    hidden, rows = draw(examples, positions, size, seed=1, dtype=dtype), draw(words, size, seed=2, dtype=dtype)
    bias = draw(words, seed=3, dtype=dtype)
    assert head.operand(hidden, rows).dtype == dtype
    for added in (None, bias):
        found = head.logits(head.operand(hidden, rows), rows, added)
        truth = hidden.double() @ rows.double().T + (0 if added is None else bias.double())
        eager = hidden.float() @ rows.float().T + (0 if added is None else bias.float())
        assert found.dtype == torch.float32
        assert worst(found, truth) <= worst(eager, truth) + 1e-6


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_sums_at_positions(shape, dtype):
    """Also where many rows belong to one position and most positions have none."""
    examples, positions, words, size = shape
    rows = draw(words, size, seed=4, dtype=dtype)
    generator = torch.Generator().manual_seed(5)
    crowded = torch.randint(positions, (examples, words), generator=generator) // 3
    for where in (torch.randint(positions, (examples, words), generator=generator), crowded):
        truth = torch.zeros(examples, positions, size, dtype=torch.float64)
        for example in range(examples):
            truth[example].index_add_(0, where[example], rows.double())
        found = head.sums_at(where, rows, positions)
        assert found.dtype == torch.float32
        # Adding up fp32 numbers one by one: at most a rounding of the largest partial sum for each.
        crowd = max(int(row.bincount(minlength=positions).max()) for row in where)
        assert worst(found, truth) <= crowd * 2**-23 * float(truth.abs().max() + rows.abs().max())
        assert torch.equal(found, head.sums_at(where, rows, positions))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("spread", [1.0, 12.0], ids=["flat", "peaked"])
def test_weighted_sums(shape, dtype, spread):
    """Slopes of a softmax less one: from -1 to probabilities that fp16 has no number for."""
    examples, positions, words, size = shape
    rows = draw(words, size, seed=6, dtype=dtype)
    slope = torch.softmax(spread * draw(examples, positions, words, seed=7, dtype=torch.float64), -1)
    slope[..., 0] -= 1
    slope = slope.float()
    kept = slope.clone()
    truth = slope.double() @ rows.double()
    eager = slope @ rows.float()
    found = head.weighted_sums(slope, rows)
    assert torch.equal(slope, kept)
    assert found.dtype == torch.float32
    # What two numbers of the type leave of a slope, times the rows; one number alone would leave 2^-9 of it.
    rest = {torch.float32: 0, torch.bfloat16: 2.0**-17, torch.float16: 2.0**-22}[dtype]
    bound = rest * (slope.double().abs() @ rows.double().abs())
    assert ((found - truth).abs() <= worst(eager, truth) + bound + 1e-9).all()


def test_small_slopes_survive_in_fp16():
    """All probabilities of a large vocabulary may be below the smallest number of the type."""
    rows = torch.ones(4096, 3, dtype=torch.float16)
    slope = torch.full((1, 1, 4096), 1e-7)
    assert float(slope.half()[0, 0, 0]) > 1.1e-7
    torch.testing.assert_close(head.weighted_sums(slope, rows), torch.full((1, 1, 3), 4096e-7), rtol=1e-5, atol=0)


def truth_of(objective, weight, bias, hidden, targets, valid):
    """f and df/dhidden by float64 autograd through all logits."""
    hidden = hidden.double().requires_grad_()
    logits = hidden @ weight.double().T + (0 if bias is None else bias.double())
    if objective == "nll":
        value = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
    else:
        value = logits.masked_fill(~valid[:, :, None], float("-inf")).max(dim=1).values.mean()
    return value.detach(), torch.autograd.grad(value, hidden)[0]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives_are_those_of_autograd_in_float64(objective, dtype, padded, monkeypatch, on_tensor_cores):
    """In chunks that do not divide the vocabulary; no further from the truth than the way of the CPU."""
    monkeypatch.setattr(head, "chunk_elements", lambda device: 4 * 12 * 100)
    weight, bias = draw(901, 40, seed=8, dtype=dtype), draw(901, seed=9, dtype=dtype)
    hidden = draw(4, 12, 40, seed=10, dtype=dtype)
    targets = torch.randint(901, (4, 12), generator=torch.Generator().manual_seed(11))
    valid = torch.ones(4, 12, dtype=torch.bool)
    if padded:
        valid[1, 9:] = valid[2, :3] = False
    targets = targets.masked_fill(~valid, IGNORE)
    totals = Totals(4, int(valid.sum()), padded)
    truth = truth_of(objective, weight, bias, hidden, targets, valid)
    found = OBJECTIVES[objective](Head(weight, bias), hidden, targets, valid, totals)
    monkeypatch.setattr(head, "tensor_cores", lambda hidden, weight: False)
    eager = OBJECTIVES[objective](Head(weight, bias), hidden, targets, valid, totals)
    for ours, plain, exact in zip(found, eager, truth, strict=True):
        assert ours.dtype == torch.float32
        # nll: what is left of slopes in two numbers of bf16 (`test_weighted_sums`).
        rest = 2**-17 if objective == "nll" and dtype == torch.bfloat16 else 0
        assert worst(ours, exact) <= 2 * worst(plain, exact) + (rest + 2**-24) * float(exact.abs().max())


def test_types_that_differ_are_multiplied_in_fp32(on_tensor_cores, monkeypatch):
    """T5 in fp16 keeps some weights in fp32."""
    monkeypatch.undo()
    half, single = (draw(2, 3, 8, seed=12, dtype=dtype) for dtype in (torch.float16, torch.float32))
    weight = draw(9, 8, seed=13, dtype=torch.float32)
    assert not head.tensor_cores(half, weight)
    assert head.operand(half, weight).dtype == torch.float32
    assert head.operand(single, weight) is single


def test_one_product_on_cuda_tensors_is_asked_of_tensor_cores():
    """On fake tensors: the call that a GPU gets, and its type."""
    with torch._subclasses.fake_tensor.FakeTensorMode():
        for dtype in head._HALF:
            hidden = torch.empty(2, 3, 8, dtype=dtype, device="cuda")
            weight = torch.empty(9, 8, dtype=dtype, device="cuda")
            assert head.tensor_cores(hidden, weight)
            found = head.logits(head.operand(hidden, weight), weight, None)
            assert (found.dtype, found.shape, found.device.type) == (torch.float32, (2, 3, 9), "cuda")
            where = torch.zeros(2, 9, dtype=torch.int64, device="cuda")
            assert head.sums_at(where, weight, 3).dtype == torch.float32
            slope = torch.empty(2, 3, 9, device="cuda")
            assert head.weighted_sums(slope, weight).shape == (2, 3, 8)
        single = torch.empty(9, 8, device="cuda")
        assert not head.tensor_cores(single.unsqueeze(0), single)
        assert head.logits(single.unsqueeze(0), single, None).dtype == torch.float32
