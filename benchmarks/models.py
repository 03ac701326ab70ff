"""Models of published shapes with random weights, made on the device: nothing is downloaded."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel

from nirvana.benchmarks.shapes import MODELS
from nirvana.parameters import auto_class


def random_model(name: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """A Llama of the shape `name` of `shapes.MODELS`, in evaluation mode."""
    model = MODELS[name]
    config = LlamaConfig(
        vocab_size=model.vocabulary,
        hidden_size=model.hidden,
        intermediate_size=model.intermediate,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.key_value_heads,
        head_dim=model.head_size,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return from_config(config, dtype, device)


def from_config(config: PreTrainedConfig, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """A model of stock or pruned shape with random weights, in evaluation mode."""
    torch.manual_seed(0)
    with torch.device(device):
        return auto_class(config).from_config(config, dtype=dtype).eval()
