"""The scalars f that are differentiated, given as their gradient by the input of the vocabulary head.

Full logits [examples, tokens, vocabulary] would be the largest tensor of the whole job (16 x 128 x 49 152 in fp32 is
403 MB), and fp32 gradients of the same size would follow. Both objectives are computed exactly in chunks of the
vocabulary instead (`nirvana.ops.head`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nirvana.architectures.inputs import IGNORE
from nirvana.ops import head as products


@dataclass(frozen=True)
class Head:
    """The vocabulary head: logits = hidden @ weight.T + bias.

    Attributes:
        weight: ``[vocabulary, hidden]``, any floating-point type.
        bias: ``[vocabulary]`` or None.
    """

    weight: Tensor
    bias: Tensor | None

    def chunks(self, hidden: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """First token id, weight rows and fp32 logits ``[examples, positions, rows]``, chunk after chunk."""
        hidden = products.operand(hidden, self.weight)
        step = max(1, products.chunk_elements(hidden.device) // max(1, hidden.shape[0] * hidden.shape[1]))
        for start in range(0, self.weight.shape[0], step):
            part = slice(start, start + step)
            rows = self.weight[part].to(hidden.dtype)
            yield start, rows, products.logits(hidden, rows, None if self.bias is None else self.bias[part])


#: (head, hidden [examples, positions, size] in the model's type, targets, valid, what a mean is taken over)
#: -> (f, df/dhidden), both fp32. All tensors are on one device, and nothing waits for it.
Objective = Callable[[Head, Tensor, Tensor, Tensor, "Totals"], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Totals:
    """What a mean is taken over: the whole calibration batch, whatever the micro-batch at hand.

    Attributes:
        examples: how many.
        targets: positions that predict a token.
        padded: whether some positions are padding.
    """

    examples: int
    targets: int
    padded: bool


def max_logit(head: Head, hidden: Tensor, targets: Tensor, valid: Tensor, totals: Totals) -> tuple[Tensor, Tensor]:
    """f = mean over (example, vocabulary) of the maximum over the sequence of the logits.

    This is the objective of NIRVANA's published code. df/dlogits is 1 / (B V) at the arg-max position of each (example,
    token id) and 0 elsewhere, so df/dhidden at a position is the sum of the head's rows whose maximum lies there.
    """
    scale = 1.0 / (totals.examples * head.weight.shape[0])
    value = torch.zeros((), device=hidden.device)
    gradient = torch.zeros_like(hidden, dtype=torch.float32)
    for _, rows, logits in head.chunks(hidden):
        if totals.padded:
            logits.masked_fill_(~valid[:, :, None], float("-inf"))
        best, where = logits.max(dim=1)
        value += best.sum()
        gradient += products.sums_at(where, rows, hidden.shape[1])
    return value * scale, gradient * scale


def nll(head: Head, hidden: Tensor, targets: Tensor, valid: Tensor, totals: Totals) -> tuple[Tensor, Tensor]:
    """f = mean next-token cross-entropy, over the positions that have a target.

    Two passes over the vocabulary: log-sum-exp first, then softmax times the head's rows.
    """
    known = targets != IGNORE
    log_normaliser = torch.full(hidden.shape[:2], float("-inf"), device=hidden.device)
    target_logit = torch.zeros_like(log_normaliser)
    for start, rows, logits in head.chunks(hidden):
        log_normaliser = torch.logaddexp(log_normaliser, logits.logsumexp(dim=-1))
        here = known & (targets >= start) & (targets < start + rows.shape[0])
        index = (targets - start).clamp(0, rows.shape[0] - 1)
        target_logit += logits.gather(2, index[:, :, None])[:, :, 0] * here
    value = ((log_normaliser - target_logit) * known).sum() / totals.targets
    gradient = torch.zeros_like(hidden, dtype=torch.float32)
    for start, rows, logits in head.chunks(hidden):
        slope = (logits - log_normaliser[:, :, None]).exp_()
        here = known & (targets >= start) & (targets < start + rows.shape[0])
        index = (targets - start).clamp(0, rows.shape[0] - 1)
        slope.scatter_add_(2, index[:, :, None], -here.to(slope.dtype)[:, :, None])
        slope *= known[:, :, None]
        gradient += products.weighted_sums(slope, rows)
    return value, gradient / totals.targets


OBJECTIVES: dict[str, Objective] = {"max-logit": max_logit, "nll": nll}
