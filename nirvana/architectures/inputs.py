"""How a block of token ids becomes the inputs and targets of a model, for scoring and for evaluation alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

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
        padding: bool ``[examples, positions]`` of the encoder's positions (of a decoder alone: empty) and of the output
            positions that are not padding, where the caller's mask is, not the model; None without a mask.
    """

    arguments: dict[str, Tensor | bool]
    targets: Tensor
    valid: Tensor
    padding: tuple[Tensor, Tensor] | None = None

    def real(self, encoder: bool) -> list[Tensor] | None:
        """For each example, int64: which positions are not padding, in the encoder or among the outputs (also of a
        decoder alone). None where nothing is padded. Known without asking the model's device."""
        if self.padding is None:
            return None
        return [row.nonzero()[:, 0] for row in self.padding[0 if encoder else 1]]


def model_inputs(model: PreTrainedModel, tokens: Tensor, attention_mask: Tensor | None = None) -> ModelInputs:
    """Prepare ``tokens`` int64 ``[examples, tokens]`` (mask: 1 for real tokens, 0 for padding), on any device.

    A decoder reads the whole window and predicts each next token. An encoder-decoder reads the first half and predicts
    the second with teacher forcing (prefix language modelling, T5, arXiv 1910.10683, section 3.2.1).
    """
    mask = mask_of(tokens, attention_mask)
    targets, valid = predicted(model.config, tokens, mask)
    if model.config.is_encoder_decoder:
        half = tokens.shape[1] // 2
        start = model.config.decoder_start_token_id
        if start is None:
            raise NirvanaError("the configuration has no decoder_start_token_id, which an encoder-decoder model needs")
        following = tokens[:, half:]
        arguments = {
            "input_ids": tokens[:, :half],
            "attention_mask": mask[:, :half],
            "decoder_input_ids": torch.cat([torch.full_like(following[:, :1], start), following[:, :-1]], dim=1),
        }
    else:
        half = 0
        arguments = {"input_ids": tokens} if attention_mask is None else {"input_ids": tokens, "attention_mask": mask}
    there = {name: values.to(model.device) for name, values in arguments.items()}
    padding = None if attention_mask is None else (mask[:, :half].bool(), valid)
    return ModelInputs({**there, "use_cache": False}, targets.to(model.device), valid.to(model.device), padding)


def mask_of(tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
    """int64 of the shape and on the device of the tokens; ones where there is no mask."""
    mask = torch.ones_like(tokens) if attention_mask is None else attention_mask.to(tokens.device, torch.int64)
    if mask.shape != tokens.shape:
        raise NirvanaError(f"the attention mask has shape {list(mask.shape)}, the tokens {list(tokens.shape)}")
    return mask


def predicted(config: PreTrainedConfig, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """`targets` and `valid` of `ModelInputs`, on the device of the tokens; `mask` is `mask_of` them."""
    if config.is_encoder_decoder:
        half = tokens.shape[1] // 2
        valid = mask[:, half:].bool()
        return tokens[:, half:].masked_fill(~valid, IGNORE), valid
    following = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], IGNORE)], dim=1)
    # Padding neither predicts nor is predicted: left of the first real token stands a position that would predict it.
    known = torch.cat([mask[:, 1:] * mask[:, :-1], torch.zeros_like(mask[:, :1])], dim=1).bool()
    return following.masked_fill(~known, IGNORE), mask.bool()
