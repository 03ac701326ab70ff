"""How far the model has moved from the dense one, on held-out tokens.

The dense model's distributions are needed for every candidate. Kept as log-probabilities they would be a vocabulary of
fp32 numbers a token; kept here are its last hidden states, in the model's own type, from which the vocabulary head
makes the very logits again. That is exact (nothing is rounded that the model did not round) and small: 576 fp32 numbers
instead of 49 152 a token on SmolLM2-135M, 9.4 MB instead of 805 MB for 32 x 128 tokens. Measured there at 30 %: KL
1.467726, against 1.467737 from whole fp32 logits of the sliced model (`nirvana.benchmarks.selection`). The price
is the head's product for both models at each look, in chunks of the vocabulary: no logits of the whole vocabulary ever
exist.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nirvana.architectures.inputs import IGNORE, model_inputs
from nirvana.calibration.batch import check_tokens
from nirvana.diagnosis import why_not_finite
from nirvana.errors import NirvanaError
from nirvana.ops.divergence import finish, linear_divergence_state, log_normaliser
from nirvana.patching import evaluation_mode, head_hands_on

#: Tokens whose logits exist at once, for a chunk of the vocabulary: 1024 x 4096 fp32 values are 17 MB a model.
POSITIONS = 1024


@dataclass(frozen=True)
class ProbeResult:
    """Means over the `tokens` probe tokens that have a target.

    Attributes:
        kl: KL(dense || model as it is now) in nats per token, in fp32 from logits in fp32, summed in fp64.
        nll: negative log-likelihood of the model as it is now, in nats per token; `perplexity` is its exponential.
        tokens: number of predicted tokens.
    """

    kl: float
    nll: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll) if self.nll < 709 else math.inf  # e^710 exceeds every float


class Probe:
    """The dense model on held-out tokens, to be compared with what becomes of it.

    Args:
        model: dense, with its language-model head, of any family; it is run once and left as it was found. Its head is
            used again by `divergence` and must not be changed in between.
        tokens: int64 ``[examples, tokens]`` without padding.
        micro_batch: examples per forward pass, here and in `divergence`; None takes all at once.

    Raises:
        NirvanaError: no tokens, token ids beyond the vocabulary, or NaN and infinity in what the model computes.
    """

    def __init__(self, model: PreTrainedModel, tokens: Tensor, *, micro_batch: int | None = None):
        if tokens.dim() > 0 and len(tokens) == 0:
            raise NirvanaError("the probe is empty; give it at least 1 example of 2 tokens")
        check_tokens(tokens, model.config)
        if micro_batch is not None and micro_batch < 1:
            raise NirvanaError(f"--micro-batch {micro_batch} must be at least 1")
        self.model = model
        self.tokens = tokens
        self._parts = tokens.split(micro_batch or len(tokens))
        hidden = [_last_hidden(model, part) for part in self._parts]
        self._dense, self._targets = [dense for dense, _ in hidden], [targets for _, targets in hidden]

    def divergence(self, model: PreTrainedModel | None = None) -> ProbeResult:
        """Compare with the model as it is now: masked, or with changed weights.

        Args:
            model: another model of the same vocabulary instead, such as the sliced one.

        Raises:
            NirvanaError: the model computes NaN or infinity, or has another vocabulary.
        """
        model = self.model if model is None else model
        dense_head, head = self.model.get_output_embeddings(), model.get_output_embeddings()
        if len(head.weight) != len(dense_head.weight):
            raise NirvanaError(
                f"the probe was made with a vocabulary of {len(dense_head.weight)}, the model has {len(head.weight)}; "
                "KL needs the same one"
            )
        return self._compare(model, lambda part, dense: _last_hidden(model, part)[0])

    def dense(self) -> ProbeResult:
        """The dense model itself, without running it again; its KL is 0."""
        return self._compare(self.model, lambda part, dense: dense)

    def _compare(self, model: PreTrainedModel, hidden_of: Callable[[Tensor, Tensor], Tensor]) -> ProbeResult:
        dense_head, head = self.model.get_output_embeddings(), model.get_output_embeddings()
        divergence = nll = 0.0
        count = 0
        for part, dense, targets in zip(self._parts, self._dense, self._targets, strict=True):
            hidden = hidden_of(part, dense)
            pieces = (tensor.split(POSITIONS) for tensor in (dense, hidden, targets.to(hidden.device)))
            for p, q, expected in zip(*pieces, strict=True):
                state = linear_divergence_state(
                    p.to(q.device).float(),
                    dense_head.weight.detach().to(q.device),
                    q.float(),
                    head.weight.detach(),
                    bias_p=_bias(dense_head, q.device),
                    bias_q=_bias(head, q.device),
                )
                divergence += finish(state).double().sum().item()
                nll += (log_normaliser(state) - _target_logits(head, q, expected)).sum().item()
            count += len(targets)
        if not math.isfinite(divergence) or not math.isfinite(nll):
            raise NirvanaError(why_not_finite(model))
        return ProbeResult(divergence / count, nll / count, count)


def _last_hidden(model: PreTrainedModel, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs of the head ``[positions, hidden]`` in the model's type, and targets ``[positions]``, where there are."""
    inputs = model_inputs(model, tokens)
    # no_grad and not inference_mode: buffers that a forward pass renews (dynamic rotary scaling) must stay usable in a
    # backward.
    with head_hands_on(model), evaluation_mode(model), torch.no_grad():
        hidden = model(**inputs.arguments).logits
    known = inputs.targets != IGNORE
    # The head may be on another device than what the model hands on.
    hidden = hidden[known].to(model.get_output_embeddings().weight.device)
    if not torch.isfinite(hidden).all():
        raise NirvanaError(why_not_finite(model))
    return hidden, inputs.targets[known]


def _target_logits(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """fp64 ``[positions]``: the logit of each position's target, without those of all other words."""
    logits = (hidden.double() * head.weight.detach()[targets].double()).sum(dim=1)
    bias = _bias(head, hidden.device)
    return logits if bias is None else logits + bias[targets].double()


def _bias(head: nn.Module, device: torch.device) -> Tensor | None:
    bias = getattr(head, "bias", None)
    return None if bias is None else bias.detach().to(device)
