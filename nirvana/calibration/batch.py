"""Checks on a calibration batch: int64 token ids ``[examples, tokens]``."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from nirvana.errors import NirvanaError


def check_tokens(tokens: Tensor, config: PreTrainedConfig) -> None:
    """Raise NirvanaError unless `tokens` is a usable batch for a model of this vocabulary."""
    if tokens.dtype != torch.int64 or tokens.dim() != 2:
        raise NirvanaError(f"tokens are {tokens.dtype} of shape {list(tokens.shape)}; give int64 [examples, tokens]")
    if tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise NirvanaError(f"tokens have shape {list(tokens.shape)}; at least 1 example of 2 tokens is needed")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= config.vocab_size:
        raise NirvanaError(
            f"token id {low if low < 0 else high} is outside the model's vocabulary of {config.vocab_size}; "
            "tokenise with this model's tokenizer"
        )
