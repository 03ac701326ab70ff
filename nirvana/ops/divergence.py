"""KL divergence between two sets of logits, without a temporary the size of the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from nirvana.ops.backends import choose
from nirvana.ops.schemas import implements, traced

_NATIVE = (torch.float32, torch.bfloat16, torch.float16)

#: Columns of the two chunks of logits that `linear_kl_divergence` holds at once, by default: 512 tokens x 4096 fp32
#: values are 8 MB each.
CHUNK = 4096


def kl_divergence(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """KL(p || q) in nats of each token, p = softmax(logits_p), q = softmax(logits_q).

    One pass with an online softmax; nothing of the size ``[tokens, vocabulary]`` is made. With m = max p_i,
    S = sum e^(p_i - m), T = sum e^(p_i - m) (p_i - q_i): KL = T / S - logsumexp(p) + logsumexp(q). A token whose p is 0
    somewhere (-inf) takes nothing from there; one where only q is 0 is infinitely far.

    Args:
        logits_p: ``[..., vocabulary]``, fp32, bf16 or fp16 (other floating-point types through an fp32 copy).
        logits_q: the same shape, any of these types.

    Returns:
        fp32 ``[...]``, not differentiable. Rounding may leave a value slightly below 0, as a sum over the vocabulary
        does.

    Raises:
        ValueError: shapes, types or devices do not fit, or the vocabulary is empty.
    """
    _check(logits_p, logits_q)
    with torch.no_grad():
        if traced(logits_p, logits_q):
            return torch.ops.nirvana.kl_divergence(logits_p, logits_q)
        return _divergence(logits_p, logits_q)


def linear_kl_divergence(
    hidden_p: Tensor,
    weight_p: Tensor,
    hidden_q: Tensor,
    weight_q: Tensor,
    *,
    bias_p: Tensor | None = None,
    bias_q: Tensor | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """`kl_divergence` of ``hidden @ weight.T + bias``; logits exist for `chunk` words of the vocabulary at a time.

    Args:
        hidden_p, hidden_q: ``[..., features]`` inputs of the two heads; the features may differ in number.
        weight_p, weight_q: ``[vocabulary, features]`` weights of the heads, of the type of the hidden states; of any
            floating-point type where those are fp32: a chunk at a time is then converted.
        bias_p, bias_q: ``[vocabulary]`` or None.
        chunk: words at a time. Bits depend on it, because the matrix product's do.

    Returns:
        fp32 ``[...]``, as `kl_divergence` of the whole logits gives it.

    Raises:
        ValueError: shapes or types do not fit.
    """
    state = linear_divergence_state(hidden_p, weight_p, hidden_q, weight_q, bias_p=bias_p, bias_q=bias_q, chunk=chunk)
    return finish(state).view(hidden_p.shape[:-1])


def linear_divergence_state(
    hidden_p: Tensor,
    weight_p: Tensor,
    hidden_q: Tensor,
    weight_q: Tensor,
    *,
    bias_p: Tensor | None = None,
    bias_q: Tensor | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """What `finish` makes the divergence of, for whoever wants the normaliser of q as well (see `log_normaliser`).

    Arguments and errors are those of `linear_kl_divergence`.

    Returns:
        fp64 ``[5, tokens]``, see `merge`.
    """
    for name, hidden, weight, bias in (("p", hidden_p, weight_p, bias_p), ("q", hidden_q, weight_q, bias_q)):
        if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"hidden_{name} {list(hidden.shape)} does not fit weight_{name} {list(weight.shape)}: "
                "[..., features] and [vocabulary, features] are needed"
            )
        if hidden.dtype != weight.dtype and not (hidden.dtype == torch.float32 and weight.is_floating_point()):
            raise ValueError(f"hidden_{name} is {hidden.dtype}, weight_{name} {weight.dtype}: they must be equal")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"bias_{name} has shape {list(bias.shape)}, it must be {list(weight.shape[:1])}")
    if weight_p.shape[0] != weight_q.shape[0] or weight_p.shape[0] == 0:
        raise ValueError(f"the heads have vocabularies of {weight_p.shape[0]} and {weight_q.shape[0]} words")
    if hidden_p.shape[:-1] != hidden_q.shape[:-1]:
        raise ValueError(f"hidden_p {list(hidden_p.shape)} and hidden_q {list(hidden_q.shape)} hold different tokens")
    if chunk < 1:
        raise ValueError(f"chunk {chunk} must be at least 1")
    with torch.no_grad():
        p, q = (hidden.reshape(-1, hidden.shape[-1]) for hidden in (hidden_p, hidden_q))
        state = None
        for start in range(0, weight_p.shape[0], chunk):
            part = slice(start, start + chunk)
            logits_p, logits_q = _logits(p, weight_p, bias_p, part), _logits(q, weight_q, bias_q, part)
            if traced(logits_p, logits_q):
                mine = torch.ops.nirvana.kl_divergence_state(logits_p, logits_q)
            else:
                mine = _divergence_state(logits_p, logits_q)
            state = mine if state is None else merge(state, mine)
        return state


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, part: slice) -> Tensor:
    bias = None if bias is None else bias[part].to(hidden.dtype)
    return torch.nn.functional.linear(hidden, weight[part].to(hidden.dtype), bias)


def merge(first: Tensor, second: Tensor) -> Tensor:
    """The state of two chunks of the vocabulary together.

    A state is fp64 ``[5, tokens]``: max p, sum e^(p - max p), sum e^(p - max p) (p - q), max q, sum e^(q - max q).
    """
    max_p, max_q = torch.maximum(first[0], second[0]), torch.maximum(first[3], second[3])
    sums = [torch.zeros_like(max_p)] * 3
    for old_p, sum_p, dot, old_q, sum_q in (first, second):
        mine = _rescaled(sum_p, old_p, max_p), _rescaled(dot, old_p, max_p), _rescaled(sum_q, old_q, max_q)
        sums = [total + one for total, one in zip(sums, mine, strict=True)]
    return torch.stack([max_p, sums[0], sums[1], max_q, sums[2]])


def finish(state: Tensor) -> Tensor:
    """fp32 ``[tokens]`` KL of a state."""
    max_p, sum_p, dot, max_q, sum_q = state
    return (dot / sum_p - (max_p - max_q) - (sum_p / sum_q).log()).float()


def log_normaliser(state: Tensor) -> Tensor:
    """fp64 ``[tokens]`` logsumexp of the logits q of a state."""
    return state[3] + state[4].log()


def _rescaled(total: Tensor, old: Tensor, new: Tensor) -> Tensor:
    # Where both maxima are -inf nothing has been summed yet; an infinite total stays so, even times e^-1000.
    return torch.where((old == new) | total.isinf(), total, total * (old - new).exp())


@implements("kl_divergence")
def _divergence(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    p, q = _normal(logits_p), _normal(logits_q)
    out = torch.empty(len(p), dtype=torch.float32, device=p.device)
    if len(p):
        choose(p.device).divergence(p, q, out)
    return out.view(logits_p.shape[:-1])


@implements("kl_divergence_state")
def _divergence_state(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    p, q = _normal(logits_p), _normal(logits_q)
    state = torch.empty((5, len(p)), dtype=torch.float64, device=p.device)
    if len(p):
        choose(p.device).divergence_state(p, q, state)
    return state


def _normal(logits: Tensor) -> Tensor:
    """A matrix in one of three types with a contiguous last dimension."""
    logits = logits.resolve_neg()
    if logits.dtype not in _NATIVE:
        logits = logits.float()
    logits = logits.reshape(-1, logits.shape[-1])
    return logits if logits.shape[1] <= 1 or logits.stride(1) == 1 else logits.contiguous()


def _check(logits_p: Tensor, logits_q: Tensor) -> None:
    if logits_p.shape != logits_q.shape:
        raise ValueError(f"logits have shapes {list(logits_p.shape)} and {list(logits_q.shape)}: they must be equal")
    if logits_p.dim() < 1 or logits_p.shape[-1] == 0:
        raise ValueError(f"logits of shape {list(logits_p.shape)} hold no vocabulary")
    for logits in (logits_p, logits_q):
        if not logits.is_floating_point():
            raise ValueError(f"logits are {logits.dtype}: floating-point types are supported")
    if logits_p.device != logits_q.device:
        raise ValueError(f"logits are on {logits_p.device} and {logits_q.device}: they must be on one device")
