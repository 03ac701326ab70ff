"""How a block of token ids becomes the inputs and targets of a model, for scoring and for evaluation alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nirvana.errors import NirvanaError

#: Target value of positions that have none, as in transformers.
IGNORE = -100


@dataclass(frozen=True)
class ModelInputs:
    """One forward pass.

    Attributes:
        arguments: keyword arguments of the model's forward.
        targets: int64 ``[examples, positions]``: the token that each output position predicts, or IGNORE.
        valid: bool ``[examples, positions]``: output positions that are not padding.
    """

    arguments: dict[str, Tensor | bool]
    targets: Tensor
    valid: Tensor


def model_inputs(model: PreTrainedModel, tokens: Tensor, attention_mask: Tensor | None = None) -> ModelInputs:
    """Prepare ``tokens`` int64 ``[examples, tokens]`` (mask: 1 for real tokens, 0 for padding).

    A decoder reads the whole window and predicts each next token. An encoder-decoder reads the first half and predicts
    the second with teacher forcing (prefix language modelling, T5, arXiv 1910.10683, section 3.2.1).
    """
    tokens = tokens.to(model.device)
    mask = torch.ones_like(tokens) if attention_mask is None else attention_mask.to(model.device, torch.int64)
    if mask.shape != tokens.shape:
        raise NirvanaError(f"the attention mask has shape {list(mask.shape)}, the tokens {list(tokens.shape)}")
    if model.config.is_encoder_decoder:
        half = tokens.shape[1] // 2
        targets, valid = tokens[:, half:], mask[:, half:].bool()
        start = model.config.decoder_start_token_id
        if start is None:
            raise NirvanaError("the configuration has no decoder_start_token_id, which an encoder-decoder model needs")
        previous = torch.cat([torch.full_like(targets[:, :1], start), targets[:, :-1]], dim=1)
        arguments = {
            "input_ids": tokens[:, :half],
            "attention_mask": mask[:, :half],
            "decoder_input_ids": previous,
            "use_cache": False,
        }
        return ModelInputs(arguments, targets.masked_fill(~valid, IGNORE), valid)
    arguments = {"input_ids": tokens, "use_cache": False}
    if attention_mask is not None:
        arguments["attention_mask"] = mask
    following = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], IGNORE)], dim=1)
    # Padding neither predicts nor is predicted: left of the first real token stands a position that would predict it.
    known = torch.cat([mask[:, 1:] * mask[:, :-1], torch.zeros_like(mask[:, :1])], dim=1).bool()
    return ModelInputs(arguments, following.masked_fill(~known, IGNORE), mask.bool())
