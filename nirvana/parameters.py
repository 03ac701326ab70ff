"""Parameter counts from a configuration alone."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig


def auto_class(config: PreTrainedConfig) -> type:
    """The Auto class that opens models of this configuration with their language-model head."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def count_parameters(config: PreTrainedConfig) -> int:
    """All parameters of the model that `config` describes, tied ones once. Nothing is allocated."""
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())
