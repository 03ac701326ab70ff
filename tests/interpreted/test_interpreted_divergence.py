"""The divergence kernel against float64, with words that a distribution excludes."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from operators import DTYPES, draw, short
from torch import Tensor

from nirvana.kernels import divergence
from nirvana.kernels.config import DivergenceConfig
from nirvana.ops import kl_divergence
from nirvana.ops.backends import reference, triton
from nirvana.ops.divergence import finish, merge

INF, LOWEST = torch.inf, torch.finfo(torch.float32).min
MIXES = list(itertools.product(DTYPES, DTYPES))


def truth(p: Tensor, q: Tensor, dtype=torch.float64) -> Tensor:
    log_p, log_q = p.to(dtype).log_softmax(-1), q.to(dtype).log_softmax(-1)
    return torch.where(log_p == -INF, 0.0, log_p.exp() * (log_p - log_q)).sum(-1)


def state_of(p: Tensor, q: Tensor, backend=triton) -> Tensor:
    state = torch.full((5, len(p)), torch.nan, dtype=torch.float64)
    backend.divergence_state(p, q, state)
    return state


def assert_no_worse_than_eager(ours, p: Tensor, q: Tensor, tiny: float = 3e-7) -> None:
    """Of the same formula in fp32; `tiny` of the sum of absolute terms, a few roundings of each.

    A sum of exponentials of which the largest is 1 rounds by 2^-24, that of p and that of q.
    """
    exact = truth(p, q)
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    # What eager takes apart, log p - log q, the kernel takes as p - q, whose rounding counts where p and q lie apart.
    size = (log_p.exp() * (log_p.abs() + log_q.abs() + (p.double() - q.double()).abs())).nan_to_num().sum(-1)
    assert ours.shape == exact.shape
    assert ((ours - exact).abs() <= (truth(p, q, torch.float32) - exact).abs() + tiny * size + 2**-23).all()


@pytest.mark.parametrize("types", MIXES, ids=short)
@pytest.mark.parametrize("shape", [(3, 1), (4, 33), (2, 2048), (3, 4099)], ids=str)
def test_all_types(types, shape):
    p, q = draw(shape, types[0], "cpu", 0) * 3, draw(shape, types[1], "cpu", 1) * 3
    assert_no_worse_than_eager(kl_divergence(p, q), p, q)
    assert torch.equal(kl_divergence(p, q), kl_divergence(p, q))


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0, 1000.0])
def test_all_sizes_of_logits(scale):
    """Long vocabularies: many steps, rising and falling maxima, and two models that agree but for a little."""
    p = draw((3, 20_000), torch.float32, "cpu", 2) * scale
    p[1] = p[1].sort().values
    p[2] = p[2].sort(descending=True).values
    for q in (draw((3, 20_000), torch.float32, "cpu", 3) * scale, p + draw((3, 20_000), torch.float32, "cpu", 4) / 16):
        assert_no_worse_than_eager(kl_divergence(p, q), p, q)
    assert (kl_divergence(p, p).abs() < 1e-6).all()


@pytest.mark.parametrize("shift", [(1000.0, 0.0), (-4000.0, 4000.0)])
def test_a_constant_does_not_drown_differences(shift):
    """Multiples of 1/256, so that the shifted logits are exact."""
    p, q = ((draw((3, 3000), torch.float32, "cpu", seed) * 256).round() / 256 for seed in (17, 18))
    torch.testing.assert_close(kl_divergence(p + shift[0], q + shift[1]), kl_divergence(p, q), rtol=0, atol=3e-7)


def test_words_that_p_excludes_count_nothing():
    p, q = draw((4, 5000), torch.float32, "cpu", 5), draw((4, 5000), torch.float32, "cpu", 6)
    p[0, 7], p[1, :4990], p[2, ::2], p[3, 4096:] = -INF, -INF, -INF, -INF
    q[0, 7], q[2, ::4] = -INF, -INF
    assert_no_worse_than_eager(kl_divergence(p, q), p, q)


def test_a_word_that_q_alone_excludes_is_infinitely_far():
    p, q = draw((5, 5000), torch.float32, "cpu", 7), draw((5, 5000), torch.float32, "cpu", 8)
    for token, word in enumerate((0, 2047, 2048, 4999)):
        q[token, word] = -INF
    # So improbable that its probability is 0 in fp32, and its lane's maximum is far below a later one.
    p[3, 4999], p[3, 7] = -500.0, 500.0
    q[4, 3], p[4, 3], p[4, 3 + 2048] = -INF, -300.0, 300.0
    assert kl_divergence(p, q).tolist() == [INF] * 5


def test_nan_stays_nan():
    p, q = draw((4, 4099), torch.float32, "cpu", 9), draw((4, 4099), torch.float32, "cpu", 10)
    p[0, 4098], q[1, 5] = torch.nan, torch.nan
    p[2] = -INF
    assert kl_divergence(p, q).isnan().tolist() == [True, True, True, False]
    q[3] = -INF
    assert kl_divergence(p, q).isnan().all()


@pytest.mark.parametrize("types", [(torch.float32, torch.float32), (torch.bfloat16, torch.float16)], ids=short)
def test_states_are_those_of_the_reference(types):
    p, q = draw((4, 4099), types[0], "cpu", 11) * 4, draw((4, 4099), types[1], "cpu", 12) * 4
    p[1, :2000], q[1, :3000], p[2], q[3] = -INF, -INF, -INF, -INF
    ours, theirs = state_of(p, q), state_of(p, q, reference)
    assert torch.equal(ours[[0, 3]], theirs[[0, 3]])
    torch.testing.assert_close(ours[[1, 2, 4]], theirs[[1, 2, 4]], rtol=3e-7, atol=2e-6)
    parts = [slice(0, 1), slice(1, 2500), slice(2500, 4099)]
    first, second, third = (state_of(p[:, part], q[:, part]) for part in parts)
    torch.testing.assert_close(
        finish(merge(merge(third, first), second)), kl_divergence(p, q), rtol=1e-6, atol=1e-6, equal_nan=True
    )


def test_rows_lie_apart_among_nan():
    frame = torch.full((9, 700), torch.nan)
    p, q = frame[1::2, 3:603], torch.full((4, 608), torch.nan, dtype=torch.bfloat16)[:, :600]
    p.copy_(draw((4, 600), torch.float32, "cpu", 13))
    q.copy_(draw((4, 600), torch.float32, "cpu", 14))
    buffer = torch.full((6,), 7.0)
    triton.divergence(p, q, buffer[1:5])
    assert_no_worse_than_eager(buffer[1:5], p, q)
    assert buffer[[0, 5]].tolist() == [7.0, 7.0]


@pytest.mark.parametrize("vocabulary", [9, 2048, 9001])
def test_bits_do_not_depend_on_alignment(vocabulary):
    """Aligned rows are read eight words at a time, others word by word."""
    frames = [torch.full((3, vocabulary + 16 - vocabulary % 16 + extra), torch.nan) for extra in (0, 0, 1, 3)]
    wide = [
        frame[:, :vocabulary].copy_(draw((3, vocabulary), torch.float32, "cpu", 34 + i))
        for i, frame in enumerate(frames[:2])
    ]
    narrow = [frame[:, 1 : vocabulary + 1].copy_(one) for frame, one in zip(frames[2:], wide, strict=True)]
    assert torch.equal(kl_divergence(*narrow), kl_divergence(*wide))
    assert torch.equal(state_of(*narrow), state_of(*wide))


def test_bits_of_a_token_do_not_depend_on_its_neighbours():
    p, q = draw((5, 1531), torch.bfloat16, "cpu", 15), draw((5, 1531), torch.float32, "cpu", 16)
    single = torch.cat([kl_divergence(p[i : i + 1], q[i : i + 1]) for i in range(5)])
    assert torch.equal(kl_divergence(p, q), single)


# A vocabulary in parts, and long ones in one part.

STEP = DivergenceConfig().lanes * DivergenceConfig().block


@pytest.fixture(params=["whole", "parts"])
def split(request, monkeypatch):
    """Whether few tokens are split, as they are by themselves."""
    if request.param == "whole":
        monkeypatch.setattr(divergence, "DivergenceConfig", functools.partial(DivergenceConfig, least_tokens=0))


@pytest.mark.parametrize("tokens", [1, 2, 8, 131, 132, 263])
@pytest.mark.parametrize("vocabulary", [1, STEP, STEP + 1, 4 * STEP - 1, 4 * STEP, 32_000, 128_256, 262_144, 2**30])
def test_parts_cover_the_vocabulary(tokens, vocabulary):
    config = DivergenceConfig()
    span = config.span(tokens, vocabulary)
    parts = -(-vocabulary // span)
    assert span % STEP == 0
    assert 1 <= parts <= min(config.most_parts, -(-512 // tokens))
    assert parts == 1 or span >= config.least_steps * STEP
    # Enough programs, but where parts would be too short or too many.
    assert tokens * parts >= 264 or parts == config.most_parts or span < 2 * config.least_steps * STEP
    assert config.span(264, vocabulary) >= vocabulary


@pytest.mark.parametrize("tokens", [1, 2, 5, 6])
@pytest.mark.parametrize("vocabulary", [3, 31, 33, 64, 65, 129, 300])
def test_boundaries_of_parts(tokens, vocabulary, monkeypatch):
    """Steps of 16 words and parts below 6 tokens: the interpreter takes milliseconds for each, however few."""
    small = DivergenceConfig(lanes=2, num_warps=1, least_tokens=6)
    monkeypatch.setattr(divergence, "DivergenceConfig", lambda: small)
    shape = tokens, vocabulary
    p, q = draw(shape, torch.float32, "cpu", 20) * 3, draw(shape, torch.bfloat16, "cpu", 21)
    ours, parts = kl_divergence(p, q), -(-vocabulary // small.span(*shape))
    assert (parts > 1) == (tokens < 6 and vocabulary > 48)
    assert_no_worse_than_eager(ours, p, q)
    assert torch.equal(kl_divergence(p, q), ours)
    assert_no_worse_than_eager(finish(state_of(p, q)), p, q)


def test_parts_of_which_some_are_excluded():
    """Of 20 480 words in five parts: whole parts, and the words beside their boundaries."""
    vocabulary = 10 * STEP
    span = DivergenceConfig().span(9, vocabulary)
    assert span == 2 * STEP
    p, q = draw((9, vocabulary), torch.float32, "cpu", 22), draw((9, vocabulary), torch.float32, "cpu", 23)
    p[0, :span] = q[0, :span] = -INF  # the first part of both
    p[1, span:] = -INF  # all but the first of p
    q[2, -span:] = -INF  # the last of q alone
    q[3, 2 * span] = -INF
    p[4, 2 * span - 1], q[4, span] = torch.nan, 1.0
    q[5, -1] = torch.nan
    p[6], q[6] = -INF, 0.0
    q[7] = -INF
    p[8, 3 * span], q[8, 3 * span + 1] = 300.0, -INF  # its probability is 0 in fp32
    ours = kl_divergence(p, q)
    assert_no_worse_than_eager(ours[:2], p[:2], q[:2])
    assert ours[[2, 3, 8]].tolist() == [INF] * 3
    assert ours[4:8].isnan().all()
    states, exact = state_of(p, q), state_of(p, q, reference)
    numbers = [0, 1, 2, 3, 6, 7, 8]
    assert torch.equal(states[:, numbers][[0, 3]], exact[:, numbers][[0, 3]])
    torch.testing.assert_close(states[[1, 2, 4]], exact[[1, 2, 4]], rtol=3e-7, atol=2e-6, equal_nan=True)


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("vocabulary", [128_256, 262_144 + 5])
def test_long_vocabularies(vocabulary):
    """Steps whose sums are half a unit in the last place of what stands in a lane: plain sums in fp32 lose 4e-6."""
    p = torch.full((3, vocabulary), -16.7)
    p[0, :STEP] = 0.0
    p[1, ::8192] = 3.0
    p[2] = draw((vocabulary,), torch.float32, "cpu", 24) * 2
    q = p + draw((3, vocabulary), torch.float32, "cpu", 25) * torch.tensor([[1e-2], [1e-3], [1.0]])
    ours = kl_divergence(p, q)
    assert_no_worse_than_eager(ours, p, q)
    assert ((ours - truth(p, q)).abs() <= 1e-7).all()


@pytest.mark.usefixtures("split")
@pytest.mark.parametrize("shift", [(1e4, 1e4), (1e4, -1e4), (-1e4, 3.0)])
def test_large_offsets(shift):
    p, q = (draw((2, 20_000), torch.float32, "cpu", 26 + i) * 2 + shift[i] for i in range(2))
    assert_no_worse_than_eager(kl_divergence(p, q), p, q)


@pytest.mark.usefixtures("split")
def test_numbers_near_overflow():
    p, q = draw((5, 20_000), torch.float32, "cpu", 28), draw((5, 20_000), torch.float32, "cpu", 29)
    p[0, 5000:] = q[0, 5000:] = LOWEST  # what masks instead of -inf
    q[1, 7:40] = LOWEST
    p[2], q[2] = LOWEST, LOWEST
    p[3, :3], q[3, 4] = 3e38, 3e38
    p[4] += torch.finfo(torch.bfloat16).max
    ours, exact = kl_divergence(p, q).double(), truth(p, q)
    assert exact.isfinite().all()
    torch.testing.assert_close(ours, exact, rtol=3e-7, atol=3e-7)
