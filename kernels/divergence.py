"""KL divergence of two matrices of logits: one pass with an online softmax, nothing of their size is written.

A program takes one token. Its threads hold independent online softmaxes ("lanes") that are merged at the end. The steps
are in fp32, the running totals in fp64, so that the length of the vocabulary does not show in the error.
"""

# ruff: noqa: N803 - compile-time arguments are upper case, as everywhere in Triton

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nirvana.kernels.config import DivergenceConfig
from nirvana.kernels.table import on
from nirvana.kernels.tree import sum_columns, sum_vector

_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _rescaled(total, old, new):
    """A fp64 total of exponentials relative to the maximum `old`, made relative to `new`."""
    # Where both are -inf nothing has been summed yet. An infinite total stays so, even times e^-1000.
    return tl.where((old == new) | (tl.abs(total) == _INFINITY), total, total * tl.exp(old - new).to(tl.float64))


@triton.jit
def _exponentials(x, maximum):
    # Nothing but -inf may have been seen: -inf - (-inf) would be NaN.
    return tl.where(x == -_INFINITY, 0.0, tl.exp(x - maximum))


@triton.jit(do_not_specialize=["tokens"])
def _divergence_kernel(
    p_ptr,
    q_ptr,
    out_ptr,
    p_stride,
    q_stride,
    tokens,
    vocabulary,
    STATE: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    p_ptr += token * p_stride
    q_ptr += token * q_stride
    max_p = tl.full([LANES], -_INFINITY, tl.float32)
    max_q = tl.full([LANES], -_INFINITY, tl.float32)
    sum_p = tl.zeros([LANES], tl.float64)
    sum_q = tl.zeros([LANES], tl.float64)
    dot = tl.zeros([LANES], tl.float64)
    words = tl.arange(0, LANES)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    for start in tl.range(0, vocabulary, LANES * BLOCK, num_stages=NUM_STAGES):
        mask = start + words < vocabulary
        p = tl.load(p_ptr + start + words, mask=mask, other=-_INFINITY).to(tl.float32)
        q = tl.load(q_ptr + start + words, mask=mask, other=-_INFINITY).to(tl.float32)
        new_p = tl.maximum(max_p, tl.max(p, axis=1))
        new_q = tl.maximum(max_q, tl.max(q, axis=1))
        e_p = _exponentials(p, new_p[:, None])
        e_q = _exponentials(q, new_q[:, None])
        # A constant between p and q would drown their differences: it is taken out in fp32 and put back in fp64.
        constant = tl.where((new_p == -_INFINITY) | (new_q == -_INFINITY), 0.0, new_p - new_q)
        difference = p - q
        # A word that q alone excludes is infinitely far, however improbable; one that p excludes counts nothing.
        product = tl.where(difference == _INFINITY, _INFINITY, e_p * (difference - constant[:, None]))
        product = tl.where(p == -_INFINITY, 0.0, product)
        step_p = sum_columns(e_p).to(tl.float64)
        step_dot = sum_columns(product).to(tl.float64) + constant.to(tl.float64) * step_p
        sum_p = _rescaled(sum_p, max_p, new_p) + step_p
        sum_q = _rescaled(sum_q, max_q, new_q) + sum_columns(e_q).to(tl.float64)
        dot = _rescaled(dot, max_p, new_p) + step_dot
        max_p = new_p
        max_q = new_q

    # Merge the lanes. In fp64, because here an error of the scale is one of the result.
    lane_p = max_p.to(tl.float64)
    lane_q = max_q.to(tl.float64)
    all_p = tl.max(lane_p, axis=0)
    all_q = tl.max(lane_q, axis=0)
    total_p = sum_vector(_rescaled(sum_p, lane_p, all_p))
    total_q = sum_vector(_rescaled(sum_q, lane_q, all_q))
    total_dot = sum_vector(_rescaled(dot, lane_p, all_p))
    if STATE:
        tl.store(out_ptr + token, all_p)
        tl.store(out_ptr + tokens + token, total_p)
        tl.store(out_ptr + 2 * tokens + token, total_dot)
        tl.store(out_ptr + 3 * tokens + token, all_q)
        tl.store(out_ptr + 4 * tokens + token, total_q)
    else:
        divergence = total_dot / total_p - (all_p - all_q) - tl.log(total_p / total_q)
        tl.store(out_ptr + token, divergence.to(tl.float32))


def divergence(logits_p: Tensor, logits_q: Tensor, out: Tensor) -> None:
    """Write KL(p || q) in nats of each token of ``[tokens, vocabulary]`` logits to `out`, fp32 ``[tokens]``."""
    _launch(logits_p, logits_q, out, state=False)


def divergence_state(logits_p: Tensor, logits_q: Tensor, state: Tensor) -> None:
    """Write what `nirvana.ops.divergence.merge` adds up over chunks of the vocabulary to `state`, fp64 ``[5, tokens]``:
    max p, sum e^(p - max p), sum e^(p - max p) (p - q), max q, sum e^(q - max q)."""
    _launch(logits_p, logits_q, state, state=True)


def _launch(logits_p: Tensor, logits_q: Tensor, out: Tensor, *, state: bool) -> None:
    tokens, vocabulary = logits_p.shape
    config = DivergenceConfig()
    with on(logits_p.device):
        _divergence_kernel[(tokens,)](
            logits_p,
            logits_q,
            out,
            logits_p.stride(0),
            logits_q.stride(0),
            tokens,
            vocabulary,
            STATE=state,
            LANES=config.lanes,
            BLOCK=config.block,
            NUM_STAGES=config.num_stages,
            num_warps=config.num_warps,
            enable_fp_fusion=False,
        )
