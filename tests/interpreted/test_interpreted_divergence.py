"""The divergence kernel against float64, with words that a distribution excludes."""

from __future__ import annotations

import itertools

import pytest
import torch
from operators import DTYPES, draw, short
from torch import Tensor

from nirvana.ops import kl_divergence
from nirvana.ops.backends import reference, triton
from nirvana.ops.divergence import finish, merge

INF = torch.inf
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


def test_bits_of_a_token_do_not_depend_on_its_neighbours():
    p, q = draw((5, 1531), torch.bfloat16, "cpu", 15), draw((5, 1531), torch.float32, "cpu", 16)
    single = torch.cat([kl_divergence(p[i : i + 1], q[i : i + 1]) for i in range(5)])
    assert torch.equal(kl_divergence(p, q), single)
