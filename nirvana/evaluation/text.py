"""Perplexity on running text, and KL divergence to a reference model on the same tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nirvana.architectures.inputs import IGNORE, model_inputs
from nirvana.calibration import token_ids
from nirvana.calibration.rows import Document
from nirvana.diagnosis import why_not_finite
from nirvana.errors import NirvanaError
from nirvana.ops import kl_divergence

#: Positions whose log-probabilities exist at once: 128 x 49 152 fp32 values are 25 MB.
POSITIONS = 128


@dataclass(frozen=True)
class TextScore:
    """Means over `tokens` predicted tokens.

    Attributes:
        nll: negative log-likelihood in nats; `perplexity` is its exponential.
        kl: KL(reference || model) in nats per token; None without a reference.
        tokens: number of predicted tokens.
        windows: number of windows they come from.
    """

    nll: float
    kl: float | None
    tokens: int
    windows: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nll)


def check_windows(window: int, stride: int, limit: int | None) -> None:
    """Raise NirvanaError for sizes out of range."""
    if window < 2 or not 0 < stride <= window:
        raise NirvanaError(f"--window {window} --stride {stride}: a window needs 2 tokens and 1 <= stride <= window")
    if limit is not None and limit < 1:
        raise NirvanaError(f"--max-windows {limit} must be at least 1")


def text_windows(
    tokenizer: PreTrainedTokenizerBase, documents: list[Document], window: int, stride: int, limit: int | None
) -> list[Tensor]:
    """Windows of `window` tokens, `stride` apart, over the joined documents; `limit` of them, evenly spaced.

    Raises:
        NirvanaError: sizes out of range, or less than one window of text.
    """
    check_windows(window, stride, limit)
    ids = torch.tensor([token for document in documents for token in token_ids(tokenizer, document)])
    starts = list(range(0, len(ids) - window + 1, stride))
    if not starts:
        raise NirvanaError(
            f"the text has {len(ids)} tokens, one window needs {window}; lower --window or give more text"
        )
    if limit is not None and limit < len(starts):
        starts = [starts[index * len(starts) // limit] for index in range(limit)]
    return [ids[start : start + window] for start in starts]


@torch.inference_mode()
def score_text(
    model: PreTrainedModel,
    windows: list[Tensor],
    *,
    stride: int | None = None,
    reference: PreTrainedModel | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> TextScore:
    """Perplexity of `model`, and KL(reference || model) if a reference is given.

    Args:
        windows: int64 ``[window]`` each; see `text_windows`.
        stride: tokens by which windows move on; only the last `stride` positions of each window after the first are
            counted, so that every token is predicted once, with the longest context. None: no overlap.
        reference: the dense model, with the same vocabulary.
        advance: called with 1 after each window.
    """
    if reference is not None and reference.config.vocab_size != model.config.vocab_size:
        raise NirvanaError(
            f"the reference has a vocabulary of {reference.config.vocab_size}, the model {model.config.vocab_size}; "
            "KL needs the same one"
        )
    nll = divergence = 0.0
    tokens = 0
    for number, window in enumerate(windows):
        inputs = model_inputs(model, window[None])
        targets = inputs.targets[0]
        counted = (targets != IGNORE).nonzero()[:, 0]
        if stride is not None and number > 0:
            counted = counted[-stride:]
        logits = model(**inputs.arguments).logits[0]
        dense = None
        if reference is not None:
            dense = reference(**model_inputs(reference, window[None]).arguments).logits[0].to(logits.device)
        for part in counted.split(POSITIONS):
            log_q = F.log_softmax(logits[part].float(), dim=-1)
            nll -= log_q.gather(1, targets[part, None]).double().sum().item()
            if dense is not None:
                divergence += kl_divergence(dense[part], logits[part]).double().sum().item()
        tokens += len(counted)
        advance(1)
    if not math.isfinite(nll):
        raise NirvanaError(why_not_finite(model))
    return TextScore(nll / tokens, None if reference is None else divergence / tokens, tokens, len(windows))
