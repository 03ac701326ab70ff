"""KL divergence of two matrices of logits: one pass with an online softmax, nothing of their size is written.

A program takes a token, or a part of its vocabulary where tokens are few. Its threads hold independent online softmaxes
("lanes") that are merged at the end, and so are the parts, in a second launch. The steps are in fp32, with the rounding
errors of the running sums kept beside them, so that the length of the vocabulary does not show in the error.
"""

# ruff: noqa: N803 - compile-time arguments are upper case, as everywhere in Triton

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nirvana.kernels.config import DivergenceConfig
from nirvana.kernels.table import on
from nirvana.kernels.tree import sum_columns, sum_vector

_INFINITY = tl.constexpr(float("inf"))
_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
_LOG2_E = tl.constexpr(1.4426950408889634)
# Sums of differences are kept in this unit, so that those of 2^30 words do not overflow, however large the words are.
_UNIT = tl.constexpr(2.0**32)


@triton.jit
def _finite_or_zero(maximum):
    """What logits are compared with. Where the maximum is -inf nothing has been seen, and -inf - -inf would be NaN."""
    return tl.where(maximum == -_INFINITY, 0.0, maximum)


@triton.jit
def _exponential(x):
    # Base 2 is the machine's own: a product and one instruction, where `tl.exp` takes care of results below 2^-126 in
    # three more. Here they count as 0, beside a sum of at least 1.
    return tl.exp2(x * _LOG2_E)


@triton.jit
def _difference(below_p, below_q):
    """(p - max p) - (q - max q) in `_UNIT`s: a constant between p and q does not drown what they differ by.

    Where p is excluded (-inf) it is finite, whatever q is, so that a probability of 0 makes 0 of it.
    """
    return tl.maximum((below_p - below_q) * (1 / _UNIT), -_LARGEST)


@triton.jit
def _add(total, error, term):
    """Kahan's sum: what `total` has lost to rounding stands in `error`."""
    term += error
    new = total + term
    return new, term - (new - total)


@triton.jit
def _step(max_p, max_q, sum_p, sum_q, dot, error_p, error_q, error_dot, p, q):
    """The state of the lanes after a block of words."""
    # NaN is skipped here, but reaches the sums and stays there.
    new_p = tl.maximum(max_p, tl.max(p, axis=1))
    new_q = tl.maximum(max_q, tl.max(q, axis=1))
    top_p = _finite_or_zero(new_p)
    top_q = _finite_or_zero(new_q)
    # What has been summed, with regard to the new maxima.
    down_p = max_p - top_p
    down_q = max_q - top_q
    dot += sum_p * _difference(down_p, down_q)
    factor_p = _exponential(down_p)
    factor_q = _exponential(down_q)

    below_p = p - top_p[:, None]
    below_q = q - top_q[:, None]
    e_p = _exponential(below_p)
    e_q = _exponential(below_q)
    product = e_p * _difference(below_p, below_q)
    sum_p, error_p = _add(sum_p * factor_p, error_p * factor_p, sum_columns(e_p))
    sum_q, error_q = _add(sum_q * factor_q, error_q * factor_q, sum_columns(e_q))
    dot, error_dot = _add(dot * factor_p, error_dot * factor_p, sum_columns(product))
    return new_p, new_q, sum_p, sum_q, dot, error_p, error_q, error_dot


@triton.jit
def _word(ptr, word, end, MASKED: tl.constexpr):
    loaded = tl.load(ptr + word, mask=word < end, other=-_INFINITY) if MASKED else tl.load(ptr + word)
    return loaded.to(tl.float32)


@triton.jit
def _words(ptr, start, end, LANES: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr):
    """fp32 [LANES, BLOCK] words from `start` on, BLOCK neighbours a lane; from `end` on they are excluded."""
    first = start + tl.arange(0, LANES) * BLOCK
    if WIDE:
        words = _word(ptr, first[:, None] + tl.arange(0, BLOCK)[None, :], end, MASKED)
    else:
        # One by one to the thread of their lane: where rows are not aligned a block would lie over the threads word by
        # word, and each thread would carry the states of eight lanes.
        tl.static_assert(BLOCK == 8)
        low = tl.join(
            tl.join(_word(ptr, first, end, MASKED), _word(ptr, first + 4, end, MASKED)),
            tl.join(_word(ptr, first + 2, end, MASKED), _word(ptr, first + 6, end, MASKED)),
        )
        high = tl.join(
            tl.join(_word(ptr, first + 1, end, MASKED), _word(ptr, first + 5, end, MASKED)),
            tl.join(_word(ptr, first + 3, end, MASKED), _word(ptr, first + 7, end, MASKED)),
        )
        words = tl.reshape(tl.join(low, high), [LANES, BLOCK])
    return words


@triton.jit
def _merged(max_p, max_q, sum_p, sum_q, dot):
    """One state of a vector of states, fp64: here an error of the scale is one of the result."""
    all_p = tl.max(max_p, axis=0)
    all_q = tl.max(max_q, axis=0)
    down_p = max_p - _finite_or_zero(all_p)
    down_q = max_q - _finite_or_zero(all_q)
    factor_p = tl.exp(down_p)
    dot += tl.where(sum_p == 0.0, 0.0, sum_p * (down_p - down_q))
    return all_p, all_q, sum_vector(sum_p * factor_p), sum_vector(sum_q * tl.exp(down_q)), sum_vector(dot * factor_p)


@triton.jit
def _finish(out_ptr, token, tokens, max_p, max_q, sum_p, sum_q, dot, STATE: tl.constexpr):
    """Write the result of a token, or what `nirvana.ops.divergence.merge` takes."""
    # Where q alone excludes a word, `dot` is infinite, or has become NaN on its way (0 * inf for a word of underflowing
    # probability, inf - inf in `_add`). Any other NaN is in the sums, and not always in `dot`: `_difference` hides it.
    dot = tl.where(dot == dot, dot, _INFINITY)
    dot = tl.where((sum_p == sum_p) & (sum_q == sum_q), dot, float("nan"))
    if STATE:
        # The sum of e^(p - max p) (p - q): with the constant that differences to the maxima are without.
        dot = tl.where(sum_p == 0.0, dot, dot + sum_p * (max_p - max_q))
        tl.store(out_ptr + token, max_p)
        tl.store(out_ptr + tokens + token, sum_p)
        tl.store(out_ptr + 2 * tokens + token, dot)
        tl.store(out_ptr + 3 * tokens + token, max_q)
        tl.store(out_ptr + 4 * tokens + token, sum_q)
    else:
        tl.store(out_ptr + token, (dot / sum_p - tl.log(sum_p / sum_q)).to(tl.float32))


@triton.jit(do_not_specialize=["tokens"])
def _divergence_kernel(
    p_ptr,
    q_ptr,
    out_ptr,
    parts_ptr,
    p_stride,
    q_stride,
    tokens,
    vocabulary,
    span,
    SPLIT: tl.constexpr,
    STATE: tl.constexpr,
    WIDE: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    p_ptr += token * p_stride
    q_ptr += token * q_stride
    begin, end = 0, vocabulary
    if SPLIT:
        begin = tl.program_id(1) * span
        end = tl.minimum(begin + span, vocabulary)
    max_p = tl.full([LANES], -_INFINITY, tl.float32)
    max_q = tl.full([LANES], -_INFINITY, tl.float32)
    sum_p = tl.zeros([LANES], tl.float32)
    sum_q = tl.zeros([LANES], tl.float32)
    dot = tl.zeros([LANES], tl.float32)
    error_p = tl.zeros([LANES], tl.float32)
    error_q = tl.zeros([LANES], tl.float32)
    error_dot = tl.zeros([LANES], tl.float32)
    whole = begin + (end - begin) // (LANES * BLOCK) * (LANES * BLOCK)
    for start in tl.range(begin, whole, LANES * BLOCK, num_stages=NUM_STAGES):
        p = _words(p_ptr, start, end, LANES, BLOCK, WIDE, MASKED=False)
        q = _words(q_ptr, start, end, LANES, BLOCK, WIDE, MASKED=False)
        max_p, max_q, sum_p, sum_q, dot, error_p, error_q, error_dot = _step(
            max_p, max_q, sum_p, sum_q, dot, error_p, error_q, error_dot, p, q
        )
    # By itself, because a mask costs the loop 18 of 233 instructions (sm_90, bf16).
    if whole < end:
        p = _words(p_ptr, whole, end, LANES, BLOCK, WIDE, MASKED=True)
        q = _words(q_ptr, whole, end, LANES, BLOCK, WIDE, MASKED=True)
        max_p, max_q, sum_p, sum_q, dot, error_p, error_q, error_dot = _step(
            max_p, max_q, sum_p, sum_q, dot, error_p, error_q, error_dot, p, q
        )
    max_p, max_q, sum_p, sum_q, dot = _merged(
        max_p.to(tl.float64),
        max_q.to(tl.float64),
        sum_p.to(tl.float64) + error_p.to(tl.float64),
        sum_q.to(tl.float64) + error_q.to(tl.float64),
        (dot.to(tl.float64) + error_dot.to(tl.float64)) * _UNIT,
    )
    if SPLIT:
        # fp64 [tokens, 5, parts]: what `_parts_kernel` reads lies side by side.
        parts = tl.num_programs(1)
        parts_ptr += token * 5 * parts + tl.program_id(1)
        tl.store(parts_ptr, max_p)
        tl.store(parts_ptr + parts, max_q)
        tl.store(parts_ptr + 2 * parts, sum_p)
        tl.store(parts_ptr + 3 * parts, sum_q)
        tl.store(parts_ptr + 4 * parts, dot)
    else:
        _finish(out_ptr, token, tokens, max_p, max_q, sum_p, sum_q, dot, STATE)


@triton.jit(do_not_specialize=["tokens", "parts"])
def _parts_kernel(parts_ptr, out_ptr, tokens, parts, STATE: tl.constexpr, PARTS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    mask = part < parts
    parts_ptr += token * 5 * parts + part
    max_p, max_q, sum_p, sum_q, dot = _merged(
        tl.load(parts_ptr, mask=mask, other=-_INFINITY),
        tl.load(parts_ptr + parts, mask=mask, other=-_INFINITY),
        tl.load(parts_ptr + 2 * parts, mask=mask, other=0.0),
        tl.load(parts_ptr + 3 * parts, mask=mask, other=0.0),
        tl.load(parts_ptr + 4 * parts, mask=mask, other=0.0),
    )
    _finish(out_ptr, token, tokens, max_p, max_q, sum_p, sum_q, dot, STATE)


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
    span = config.span(tokens, vocabulary)
    parts = -(-vocabulary // span)
    # What Triton itself takes for aligned: the addresses in bytes, the strides in elements.
    together = logits_p.data_ptr() | logits_q.data_ptr() | logits_p.stride(0) | logits_q.stride(0)
    # Where there is one part, nobody writes there.
    states = torch.empty(tokens * 5 * parts, dtype=torch.float64, device=out.device) if parts > 1 else out
    with on(logits_p.device):
        _divergence_kernel[(tokens, parts)](
            logits_p,
            logits_q,
            out,
            states,
            logits_p.stride(0),
            logits_q.stride(0),
            tokens,
            vocabulary,
            span,
            SPLIT=parts > 1,
            STATE=state,
            WIDE=together % 16 == 0,
            LANES=config.lanes,
            BLOCK=config.block,
            NUM_STAGES=config.num_stages,
            num_warps=config.num_warps,
            enable_fp_fusion=False,
        )
        if parts > 1:
            _parts_kernel[(tokens,)](
                states,
                out,
                tokens,
                parts,
                STATE=state,
                PARTS=config.most_parts,
                num_warps=1,
                enable_fp_fusion=False,
            )
