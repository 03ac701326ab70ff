"""kl_divergence and linear_kl_divergence against float64, for every backend on every device at hand."""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operators import DTYPES, KERNELS, NEEDS_KERNELS, SERVED, draw, peak_growth, short
from torch import Tensor

from nirvana.ops import kl_divergence, linear_kl_divergence, use_backend
from nirvana.ops.divergence import CHUNK, finish, merge

pytest_plugins = ("operators",)
pytestmark = pytest.mark.usefixtures("poison", "one_thread")

INF, NAN = math.inf, math.nan
MIXES = list(itertools.product(DTYPES, DTYPES))


def truth(p: Tensor, q: Tensor) -> Tensor:
    """sum p (log p - log q) in float64, where p log p is 0 for p = 0."""
    p, q = p.double(), q.double()
    log_p, log_q = p - p.logsumexp(-1, keepdim=True), q - q.logsumexp(-1, keepdim=True)
    terms = log_p.exp() * (log_p - log_q)
    return torch.where(p == -INF, 0.0, terms).sum(-1)


def eager(p: Tensor, q: Tensor) -> Tensor:
    """The usual way, in fp32: four temporaries of the size of the logits."""
    log_p, log_q = torch.log_softmax(p.float(), dim=-1), torch.log_softmax(q.float(), dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def assert_no_worse_than_eager(ours: Tensor, p: Tensor, q: Tensor, spread: float = 8.0) -> None:
    """`spread` bounds log p, log q and p - q: the numbers whose differences the result is."""
    exact = truth(p, q)
    assert ours.dtype == torch.float32
    assert ours.shape == exact.shape
    error = (ours.double() - exact).abs()
    theirs = (eager(p, q).double() - exact).abs()
    # One rounding of such a number to fp32; eager's own error may be 0 by luck.
    assert (error <= theirs + 2**-24 * (spread + exact)).all(), f"{(error - theirs).max()} worse than eager"
    assert (error <= 2**-22 * (spread + exact)).all(), f"error {error.max()}"


@pytest.mark.parametrize(
    "shape",
    [
        (1,),
        (2,),
        (33,),
        (1, 1),
        (3, 1),
        (5, 2),
        (4, 7),
        (2, 3, 33),
        (2, 1, 2, 5),
        (9, 1000),
        (2, 4097),
        (0, 5),
        (2, 0, 5),
    ],
    ids=str,
)
@pytest.mark.parametrize("types", MIXES, ids=short)
def test_kl_divergence_is_no_worse_than_eager(device, shape, types):
    p, q = draw(shape, types[0], device, 0), draw(shape, types[1], device, 1)
    ours = kl_divergence(p, q)
    assert_no_worse_than_eager(ours, p, q)
    if shape[-1] == 1:
        assert (ours.abs() < 1e-6).all(), "one word has probability 1"


@pytest.mark.parametrize(
    "types", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float16, torch.float32)], ids=short
)
def test_kl_divergence_of_real_vocabularies(device, types):
    """Of GPT-2 (odd), Llama 3 and what is one more than a power of two; the second logits are near the first."""
    for size in (50_257, 65_537, 128_256):
        p = draw((3, size), torch.float32, device, 2) * 3
        q = (p + 0.1 * draw((3, size), torch.float32, device, 3)).to(types[1])
        p = p.to(types[0])
        assert_no_worse_than_eager(kl_divergence(p, q), p, q, spread=16.0)


@pytest.mark.usefixtures("sized")
def test_errors_over_many_tokens_are_no_larger_than_those_of_eager(device):
    """Root mean square of 2000 tokens: what one lucky token cannot decide."""
    p, q = draw((2000, 1531), torch.float32, device, 4) * 2, draw((2000, 1531), torch.float32, device, 5) * 2
    exact = truth(p, q)
    error, theirs = (kl_divergence(p, q) - exact).abs(), (eager(p, q) - exact).abs()
    assert error.square().mean().sqrt() <= theirs.square().mean().sqrt()
    assert error.max() <= 1.5 * theirs.max()


@pytest.mark.parametrize("types", MIXES, ids=short)
def test_kl_divergence_reads_any_strides(device, types):
    wide_p, wide_q = draw((14, 90), types[0], device, 6), draw((45, 8), types[1], device, 7)
    p, q = wide_p[::2, 3:48], wide_q[:, :7].T
    assert not p.is_contiguous()
    assert not q.is_contiguous()
    assert_no_worse_than_eager(kl_divergence(p, q), p, q)
    p, q = wide_p[:1, :45].expand(7, 45), wide_q[:, 3:4].T.expand(7, 45)
    assert_no_worse_than_eager(kl_divergence(p, q), p, q)
    # The last token of every sequence, as a 3-D view that is no matrix.
    p, q = draw((3, 4, 21), types[0], device, 8)[:, 1:3], draw((2, 3, 21), types[1], device, 9).transpose(0, 1)
    assert_no_worse_than_eager(kl_divergence(p, q), p, q)
    p, q = draw((21, 6), types[0], device, 10)[:, 2], draw((42,), types[1], device, 11)[::2]
    assert_no_worse_than_eager(kl_divergence(p, q), p, q)


def test_kl_divergence_reads_lazy_negatives(device):
    p, q = draw((3, 9), torch.float32, device, 12), draw((3, 9), torch.float32, device, 13)
    assert torch.equal(kl_divergence(torch._neg_view(p), q), kl_divergence(-p, q))


@given(data=st.data())
@settings(derandomize=True, deadline=None, max_examples=100, database=None)
def test_kl_divergence_of_anything(data):
    tokens, words = data.draw(st.integers(0, 6), "tokens"), data.draw(st.integers(1, 300), "words")
    types = data.draw(st.sampled_from(MIXES), "types")
    scale = data.draw(st.sampled_from([0.0, 0.1, 1.0, 10.0]), "scale")
    masks = [data.draw(st.sampled_from([0.0, 0.0, 0.3, 0.95]), "share of -inf") for _ in range(2)]
    for device, backend in SERVED:
        p, q = ((draw((tokens, words), torch.float32, device, s) * scale).to(t) for s, t in enumerate(types))
        for seed, (logits, share) in enumerate(zip((p, q), masks, strict=True)):
            hidden = draw((tokens, words), torch.float32, device, 10 + seed).erf().add(1).div(2) < share
            hidden[:, words // 2] = False
            logits[hidden] = -INF
        with use_backend(backend):
            ours = kl_divergence(p, q)
        exact = truth(p, q)
        assert torch.equal(ours.isposinf(), exact.isposinf())
        finite = exact.isfinite()
        error = (ours.double() - exact).abs()[finite]
        assert (error <= 2**-22 * (8 + 5 * scale + exact[finite])).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn], ids=short)
def test_other_types_are_read_through_fp32(device, dtype):
    p, q = draw((3, 40), dtype, device, 14), draw((3, 40), torch.bfloat16, device, 15)
    assert torch.equal(kl_divergence(p, q), kl_divergence(p.float(), q))
    assert torch.equal(kl_divergence(q, p), kl_divergence(q, p.float()))


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("words", [1, 2, 33, 5003])
def test_identical_logits_are_zero_apart(device, dtype, scale, words):
    logits = (draw((7, words), torch.float32, device, 16) * scale).to(dtype)
    for other in (logits, logits.clone(), logits.float()):
        assert (kl_divergence(logits, other).abs() < 1e-6).all()


@pytest.mark.parametrize("types", MIXES, ids=short)
@pytest.mark.parametrize("words", [2, 33, 5003])
def test_huge_logits(device, types, words):
    """1e4 and more: e^1e4 is infinite in every type, so only differences to the maximum may be exponentiated."""
    p, q = ((draw((5, words), torch.float32, device, 17 + s) * 1e4).to(t) for s, t in enumerate(types))
    exact = truth(p, q)
    assert exact.max() > 1e4
    torch.testing.assert_close(kl_divergence(p, q).double(), exact, rtol=3e-7, atol=1e-6)


def test_a_distribution_of_one_word_against_an_even_one(device):
    for words in (2, 33, 5003):
        p, q = torch.zeros(words, device=device), torch.zeros(words, device=device)
        p[words // 3] = 500.0
        assert kl_divergence(p, q).item() == pytest.approx(math.log(words), rel=1e-6)
        # Backwards every other word is 500 nats less likely than 1/words.
        assert kl_divergence(q, p).item() == pytest.approx(500 * (words - 1) / words - math.log(words), rel=1e-6)


@pytest.mark.parametrize("shift", [(1024.0, 0.0), (0.0, -512.0), (4096.0, 4096.0), (-2048.0, 1024.0)])
def test_kl_divergence_does_not_change_with_a_constant(device, shift):
    """Multiples of 2^-8 below 2^13 in fp32: the shifted logits are exact."""
    p, q = ((draw((6, 777), torch.float32, device, seed) * 256).round() / 256 for seed in (20, 21))
    before = kl_divergence(p, q)
    after = kl_divergence(p + shift[0], q + shift[1])
    # The maxima grow to 4096, and their roundings with them, unless the kernel takes differences first.
    torch.testing.assert_close(after, before, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
@pytest.mark.parametrize(
    ("p", "q", "expected"),
    [
        ([0, -INF], [0, 0], math.log(2)),
        ([-INF, 0], [0, 0], math.log(2)),
        ([0, 0], [0, -INF], INF),
        ([0, 0], [-INF, 0], INF),
        ([-INF, 0], [-INF, 0], 0.0),
        ([0, -INF], [1, -INF], 0.0),
        ([0, -INF], [-INF, 0], INF),
        ([-INF, 0, 0], [-INF, 0, -INF], INF),
        ([0, -300], [0, -INF], INF),
        ([-300, 0], [-INF, 0], INF),
        ([-INF, -INF], [0, 0], NAN),
        ([0, 0], [-INF, -INF], NAN),
        ([-INF, -INF], [-INF, -INF], NAN),
        ([-INF], [-INF], NAN),
        ([NAN, 0], [0, 0], NAN),
        ([0, 0], [0, NAN], NAN),
        ([-INF, 0], [NAN, 0], NAN),
        ([NAN, 0], [-INF, 0], NAN),
        ([0, 0], [-INF, NAN], NAN),
        ([INF, 0], [0, 0], NAN),
        ([0, 0], [INF, 0], NAN),
        ([INF, 0], [INF, 0], NAN),
    ],
    ids=str,
)
def test_words_that_are_excluded(device, dtype, p, q, expected):
    """What p excludes takes nothing; what q alone excludes is infinitely far; no distribution at all is NaN."""
    p, q = (torch.tensor(logits, dtype=dtype, device=device) for logits in (p, q))
    # Alone, and between tokens that it must not disturb.
    other = torch.arange(len(p), dtype=dtype, device=device)
    ours = [
        kl_divergence(p, q).item(),
        kl_divergence(torch.stack([other, p, other]), torch.stack([other, q, other]))[1].item(),
    ]
    assert ours == [pytest.approx(expected, rel=1e-6, abs=1e-7, nan_ok=True)] * 2


@pytest.mark.parametrize("first", [0, 1, 17, 63, 64, 1023, 1024, 2500, 4098])
def test_excluded_words_anywhere_in_a_vocabulary(device, first):
    """Runs of -inf at the start, where no maximum exists yet, and at the end, in p, in q and in both."""
    p, q = draw((4, 4099), torch.float32, device, 22), draw((4, 4099), torch.float32, device, 23)
    for words in (slice(0, first), slice(first, first + 1), slice(first + 1, None), slice(first, first + 700)):
        if len(range(4099)[words]) in (0, 4099):
            continue
        for hide_p, hide_q in ((True, False), (True, True), (False, True)):
            logits = [p.clone(), q.clone()]
            for tensor, hide in zip(logits, (hide_p, hide_q), strict=True):
                # Every token but the second.
                tensor[:1, words] = tensor[2:, words] = -INF if hide else tensor[0, words.start or 0]
            exact = truth(*logits)
            assert exact.isinf().sum() == (3 if not hide_p else 0)
            # Eager itself is 4e-6 off.
            torch.testing.assert_close(kl_divergence(*logits).double(), exact, rtol=1e-6, atol=5e-6)


def test_a_likely_nan_is_not_lost_in_a_vocabulary(device):
    for place in (0, 100, 2047, 2048, 4098):
        p, q = draw((3, 4099), torch.float32, device, 24), draw((3, 4099), torch.float32, device, 25)
        p[0, place] = q[1, place] = NAN
        assert kl_divergence(p, q).isnan().tolist() == [True, True, False]


def test_kl_divergence_is_outside_the_graph(device):
    p, q = (draw((3, 5), torch.float32, device, seed).requires_grad_() for seed in (26, 27))
    copies = p.detach().clone(), q.detach().clone()
    assert not kl_divergence(p, q).requires_grad
    assert not linear_kl_divergence(p, q, q, p).requires_grad
    assert torch.equal(p, copies[0])
    assert torch.equal(q, copies[1])


@pytest.mark.usefixtures("sized", "restored_threads")
@pytest.mark.parametrize("shape", [(1, 70_001), (2, 50_257), (150, 3333), (70_001, 2)], ids=str)
@pytest.mark.parametrize("types", [(torch.float32, torch.float32), (torch.bfloat16, torch.float16)], ids=short)
def test_bits_depend_neither_on_the_run_nor_on_the_threads(device, shape, types):
    p, q = draw(shape, types[0], device, 28), draw(shape, types[1], device, 29)
    results = []
    for threads in (1, 1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append([kl_divergence(p, q), torch.ops.nirvana.kl_divergence_state(p, q)])
    for other in results[1:]:
        assert torch.equal(results[0][0], other[0])
        assert torch.equal(results[0][1], other[1])


def test_bits_of_a_token_do_not_depend_on_its_neighbours(device):
    p, q = draw((40, 1531), torch.bfloat16, device, 30), draw((40, 1531), torch.float32, device, 31)
    whole = kl_divergence(p, q)
    assert torch.equal(whole, torch.cat([kl_divergence(p[i : i + 1], q[i : i + 1]) for i in range(40)]))
    assert torch.equal(whole, torch.cat([kl_divergence(p[i : i + 7], q[i : i + 7]) for i in range(0, 40, 7)]))


@NEEDS_KERNELS
@pytest.mark.parametrize(("device", "backend"), KERNELS, ids=map("-".join, KERNELS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=short)
def test_nothing_of_the_size_of_the_vocabulary_is_made(device, backend, dtype):
    """512 tokens of 49 152 words are 101 MB in fp32. The reference shows that the measurement can see them."""
    p, q = (torch.empty((512, 49_152), dtype=dtype, device=device).normal_() for _ in range(2))
    with use_backend(backend):
        kl_divergence(p[:8], q[:8])
        assert peak_growth(device, lambda: kl_divergence(p, q)) < 10e6
    with use_backend("torch"):
        assert peak_growth(device, lambda: kl_divergence(p[:256], q[:256])) > 100e6


def test_tokens_more_than_two_to_the_31_elements_apart(device):
    """Memory that nobody touches costs a CPU nothing."""
    stride = 2**31 // 3 + 5
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 8 * stride:
        pytest.skip("needs 6 GB on the GPU")
    p = torch.empty(3 * stride + 40, dtype=torch.bfloat16, device=device).as_strided((4, 40), (stride, 1))
    p.copy_(draw((4, 40), torch.bfloat16, device, 32))
    q = draw((4, 40), torch.float32, device, 33)
    assert torch.equal(kl_divergence(p, q), kl_divergence(p.contiguous(), q))
    assert torch.equal(kl_divergence(q, p), kl_divergence(q, p.contiguous()))


@pytest.mark.parametrize(
    ("p", "q", "message"),
    [
        (torch.ones(2, 5), torch.ones(2, 6), "logits have shapes [2, 5] and [2, 6]"),
        (torch.ones(2, 5), torch.ones(5), "logits have shapes [2, 5] and [5]"),
        (torch.ones(()), torch.ones(()), "hold no vocabulary"),
        (torch.ones(3, 0), torch.ones(3, 0), "hold no vocabulary"),
        (torch.ones(2, 5, dtype=torch.int64), torch.ones(2, 5), "logits are torch.int64"),
        (torch.ones(2, 5), torch.ones(2, 5, dtype=torch.bool), "logits are torch.bool"),
        (torch.ones(2, 5), torch.ones(2, 5, dtype=torch.complex64), "logits are torch.complex64"),
    ],
)
def test_kl_divergence_refuses(device, p, q, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        kl_divergence(p.to(device), q.to(device))


def test_kl_divergence_refuses_two_devices(device):
    with pytest.raises(ValueError, match=f"logits are on {device}.* and meta"):
        kl_divergence(torch.ones(2, 5, device=device), torch.ones(2, 5, device="meta"))


# From hidden states and the weights of two heads.


def heads(
    device: str, tokens: tuple[int, ...], words: int, features: tuple[int, int], dtype=torch.float32
) -> list[Tensor]:
    """Small whole numbers: logits and their sums are exact, in bf16 too, whatever the chunk."""
    shapes = [
        (*tokens, features[0]),
        (words, features[0]),
        (*tokens, features[1]),
        (words, features[1]),
        (words,),
        (words,),
    ]
    return [
        (draw(shape, torch.float32, device, 40 + seed) * 1.5).round().clamp(-3, 3).to(dtype)
        for seed, shape in enumerate(shapes)
    ]


def whole_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = hidden.double() @ weight.double().T
    return logits if bias is None else logits + bias.double()


@pytest.mark.parametrize("chunk", [1, 3, 32, 96, 97, 98, 1000, None])
@pytest.mark.parametrize("with_bias", [(False, False), (True, True), (False, True)], ids=str)
@pytest.mark.parametrize("tokens", [(5,), (2, 3), (1,), (0,), ()], ids=str)
def test_linear_kl_divergence_is_that_of_the_whole_logits(device, chunk, with_bias, tokens):
    hidden_p, weight_p, hidden_q, weight_q, bias_p, bias_q = heads(device, tokens, 97, (8, 5))
    bias_p, bias_q = bias_p if with_bias[0] else None, bias_q if with_bias[1] else None
    size = {} if chunk is None else {"chunk": chunk}
    ours = linear_kl_divergence(hidden_p, weight_p, hidden_q, weight_q, bias_p=bias_p, bias_q=bias_q, **size)
    p, q = whole_logits(hidden_p, weight_p, bias_p), whole_logits(hidden_q, weight_q, bias_q)
    assert_no_worse_than_eager(ours, p, q, spread=32.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=short)
def test_linear_kl_divergence_in_several_types(device, dtype):
    hidden_p, weight_p, hidden_q, weight_q, *_ = heads(device, (6,), 300, (8, 12), dtype)
    p, q = whole_logits(hidden_p, weight_p, None), whole_logits(hidden_q, weight_q, None)
    for chunk in (64, 300):
        ours = linear_kl_divergence(hidden_p, weight_p, hidden_q, weight_q, chunk=chunk)
        assert_no_worse_than_eager(ours, p, q, spread=32.0)
        ours = linear_kl_divergence(hidden_p, weight_p, hidden_q.float(), weight_q.float(), chunk=chunk)
        assert_no_worse_than_eager(ours, p, q, spread=32.0)


def test_linear_kl_divergence_of_random_heads(device):
    """Logits that round, of a vocabulary longer than the default chunk."""
    words = 2 * CHUNK + 100
    hidden_p, hidden_q = draw((4, 24), torch.float32, device, 50), draw((4, 24), torch.float32, device, 51)
    weight_p, weight_q = draw((words, 24), torch.float32, device, 52), draw((words, 24), torch.float32, device, 53)
    exact = truth(whole_logits(hidden_p, weight_p, None), whole_logits(hidden_q, weight_q, None))
    assert exact.min() > 5
    # Logits of about 20 of 24 rounded products: a few units of 2^-24 of them.
    ours = linear_kl_divergence(hidden_p, weight_p, hidden_q, weight_q)
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-5)
    same = linear_kl_divergence(hidden_p, weight_p, hidden_p, weight_p)
    assert (same.abs() < 1e-6).all()


@pytest.mark.parametrize("chunk", [1, 7, 10, 40])
def test_linear_kl_divergence_of_masked_words(device, chunk):
    """A bias of -inf excludes words: for a whole chunk, for the first and the last one, and for all of them."""
    hidden_p, weight_p, hidden_q, weight_q, bias_p, bias_q = heads(device, (6,), 40, (8, 5))
    for p_words, q_words, infinite in (
        (range(10, 20), range(10, 20), False),
        ([*range(10), *range(33, 40)], range(7), False),
        (range(39), [3], False),
        ([3], range(5), True),
        ([], range(39), True),
    ):
        masked_p, masked_q = bias_p.clone(), bias_q.clone()
        masked_p[list(p_words)] = masked_q[list(q_words)] = -INF
        ours = linear_kl_divergence(
            hidden_p, weight_p, hidden_q, weight_q, bias_p=masked_p, bias_q=masked_q, chunk=chunk
        )
        p, q = whole_logits(hidden_p, weight_p, masked_p), whole_logits(hidden_q, weight_q, masked_q)
        exact = truth(p, q)
        assert exact.isinf().all() == infinite
        torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-6)
    nothing = torch.full_like(bias_p, -INF)
    for masks in ((nothing, bias_q), (bias_p, nothing), (nothing, nothing)):
        ours = linear_kl_divergence(
            hidden_p, weight_p, hidden_q, weight_q, bias_p=masks[0], bias_q=masks[1], chunk=chunk
        )
        assert ours.isnan().all()


def test_linear_kl_divergence_of_huge_logits(device):
    hidden_p, weight_p, hidden_q, weight_q, *_ = heads(device, (6,), 97, (8, 5))
    p, q = whole_logits(hidden_p * 500, weight_p, None), whole_logits(hidden_q * 700, weight_q, None)
    exact = truth(p, q)
    assert exact.max() > 1e4
    for chunk in (1, 30, 97):
        ours = linear_kl_divergence(hidden_p * 500, weight_p, hidden_q * 700, weight_q, chunk=chunk)
        torch.testing.assert_close(ours.double(), exact, rtol=3e-7, atol=1e-6)


@pytest.mark.parametrize("types", MIXES, ids=short)
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (3, 4099)], ids=str)
def test_states_hold_what_they_say(device, types, shape):
    p, q = draw(shape, types[0], device, 54) * 5, draw(shape, types[1], device, 55) * 5
    state = torch.ops.nirvana.kl_divergence_state(p, q)
    assert state.dtype == torch.float64
    assert state.shape == (5, shape[0])
    p, q = p.double(), q.double()
    e_p, e_q = (p - p.amax(-1, keepdim=True)).exp(), (q - q.amax(-1, keepdim=True)).exp()
    torch.testing.assert_close(state[0], p.amax(-1), rtol=0, atol=0)
    torch.testing.assert_close(state[3], q.amax(-1), rtol=0, atol=0)
    torch.testing.assert_close(state[1], e_p.sum(-1), rtol=5e-7, atol=0)
    torch.testing.assert_close(state[4], e_q.sum(-1), rtol=5e-7, atol=0)
    size = (e_p * (p - q).abs()).sum(-1)
    assert ((state[2] - (e_p * (p - q)).sum(-1)).abs() <= 5e-7 * size).all()


@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_states_merge_in_any_order(device, scale):
    p, q = (draw((6, 500), torch.float32, device, seed) * scale for seed in (56, 57))
    parts = [slice(0, 100), slice(100, 101), slice(101, 400), slice(400, 500)]
    states = [torch.ops.nirvana.kl_divergence_state(p[:, part], q[:, part]) for part in parts]
    first, second, third, fourth = states
    exact = truth(p, q)
    for state in (
        merge(merge(merge(first, second), third), fourth),
        merge(merge(fourth, third), merge(second, first)),
        merge(first, merge(second, merge(fourth, third))),
        torch.ops.nirvana.kl_divergence_state(p, q),
    ):
        assert finish(state).dtype == torch.float32
        torch.testing.assert_close(finish(state).double(), exact, rtol=1e-6, atol=1e-6 * scale)


@pytest.mark.parametrize("words", [2, 33, 5003])
@pytest.mark.parametrize("likely", [50.0, 500.0, 2000.0])
def test_an_infinite_distance_outlasts_later_maxima(device, words, likely):
    """A word that q excludes, and much later one that is e^2000 times as likely: infinity times 0 would be NaN."""
    p, q = torch.zeros(words, device=device), torch.zeros(words, device=device)
    p[-1], q[0] = likely, -INF
    assert kl_divergence(p, q).item() == INF
    states = [
        torch.ops.nirvana.kl_divergence_state(p[None, part], q[None, part]) for part in (slice(0, 1), slice(1, None))
    ]
    assert finish(merge(*states)).item() == INF
    assert finish(merge(*reversed(states))).item() == INF
    ones = torch.ones(1, 1, device=device)
    assert linear_kl_divergence(ones, p[:, None], ones, q[:, None], chunk=max(1, words // 3)).item() == INF


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_p": torch.ones(9, 5)}, "hidden_p [2, 4] does not fit weight_p [9, 5]"),
        ({"weight_q": torch.ones(9)}, "hidden_q [2, 3] does not fit weight_q [9]"),
        ({"hidden_q": torch.ones(())}, "hidden_q [] does not fit weight_q [9, 3]"),
        ({"hidden_p": torch.ones(2, 4).bfloat16()}, "hidden_p is torch.bfloat16, weight_p torch.float32"),
        ({"bias_p": torch.ones(8)}, "bias_p has shape [8], it must be [9]"),
        ({"bias_q": torch.ones(1, 9)}, "bias_q has shape [1, 9], it must be [9]"),
        ({"weight_q": torch.ones(8, 3)}, "vocabularies of 9 and 8 words"),
        ({"weight_p": torch.ones(0, 4), "weight_q": torch.ones(0, 3)}, "vocabularies of 0 and 0 words"),
        ({"hidden_q": torch.ones(3, 3)}, "hidden_p [2, 4] and hidden_q [3, 3] hold different tokens"),
        ({"chunk": 0}, "chunk 0 must be at least 1"),
        ({"chunk": -5}, "chunk -5 must be at least 1"),
    ],
)
def test_linear_kl_divergence_refuses(device, change, message):
    arguments = {"hidden_p": torch.ones(2, 4), "weight_p": torch.ones(9, 4), "hidden_q": torch.ones(2, 3)}
    arguments |= {"weight_q": torch.ones(9, 3), **change}
    arguments = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        linear_kl_divergence(**arguments)
