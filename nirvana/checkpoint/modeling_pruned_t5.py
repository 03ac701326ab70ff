"""T5 whose layers differ in width: the stock blocks, each with its own heads and its own position bias.

Stock T5 computes one relative-position bias in the first layer and hands it to the others, which works only while all
of them have the same heads. Here every self-attention carries the columns of that table which belong to its kept
heads, so no layer depends on another's. Encoder and decoder widths stand in two maps of the configuration
(`per_layer_encoder_config`, `per_layer_decoder_config`: layer index -> num_heads, d_ff and, in the decoder,
cross_num_heads), because T5's two stacks can differ in depth, which the one `per_layer_config` of transformers cannot
say. No field may start with `decoder_`: get_text_config() would rename it.

This very file is a module of nirvana and also lies in every checkpoint folder that needs it: `trust_remote_code=True`
opens such a folder where nirvana is not installed. So it imports torch and transformers only. Licence: Apache-2.0.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration, T5Model
from transformers.models.t5.modeling_t5 import T5Attention, T5Block, T5LayerCrossAttention, T5Stack

#: Name of this module inside a checkpoint folder, and version of the configurations that it reads.
FILE, FORMAT = "modeling_pruned_t5", 1


@strict
class PrunedT5Config(T5Config):
    model_type = "pruned_t5"

    per_layer_encoder_config: dict | None = None
    per_layer_decoder_config: dict | None = None

    def __post_init__(self, **kwargs):
        written = kwargs.pop("pruned_format", FORMAT)
        if written != FORMAT:
            raise ValueError(f"pruned_format {written!r} is not supported, {FORMAT} is; upgrade nirvana")
        super().__post_init__(**kwargs)
        self.pruned_format = FORMAT
        # Which class of this file, copied into every saved folder, serves which Auto class.
        self.auto_map = {
            "AutoConfig": f"{FILE}.PrunedT5Config",
            "AutoModel": f"{FILE}.PrunedT5Model",
            "AutoModelForSeq2SeqLM": f"{FILE}.PrunedT5ForConditionalGeneration",
        }

    def layer_config(self, stack: str, index: int) -> PrunedT5Config:
        """The configuration of one block of `stack` ("encoder" or "decoder"), its own widths filled in."""
        overrides = getattr(self, f"per_layer_{stack}_config") or {}
        layer = copy.copy(self)
        for name, value in overrides.get(str(index), {}).items():
            setattr(layer, name, value)
        return layer


class PrunedT5Block(T5Block):
    """A stock block that owns its position bias and ignores the one handed on by the block before."""

    def __init__(self, config: T5Config, layer_idx: int):
        super().__init__(config, has_relative_attention_bias=True, layer_idx=layer_idx)
        if self.is_decoder:
            cross = copy.copy(config)
            cross.num_heads = getattr(config, "cross_num_heads", config.num_heads)
            self.layer[1] = T5LayerCrossAttention(cross, layer_idx=layer_idx)

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        position_bias=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        encoder_decoder_position_bias=None,
        **kwargs,
    ):
        return super().forward(
            hidden_states, attention_mask, None, encoder_hidden_states, encoder_attention_mask, None, **kwargs
        )


@contextlib.contextmanager
def _layers_hidden(config: PrunedT5Config) -> Iterator[None]:
    """Inside, `config` has no layers: the stock constructors build all the rest and write to this very object."""
    depths = config.num_layers, config.num_decoder_layers
    config.num_layers = config.num_decoder_layers = 0
    try:
        yield
    finally:
        config.num_layers, config.num_decoder_layers = depths


class PrunedT5Stack(T5Stack):
    config_class = PrunedT5Config
    _no_split_modules = ["PrunedT5Block"]  # noqa: RUF012 (the attribute of transformers)

    def __init__(self, config: PrunedT5Config):
        with _layers_hidden(config):
            super().__init__(config)
        stack = "decoder" if config.is_decoder else "encoder"
        self.block = nn.ModuleList(
            PrunedT5Block(config.layer_config(stack, index), index) for index in range(config.num_layers)
        )
        for attention in self.modules():
            if isinstance(attention, T5Attention):
                # set_attn_implementation() changes the stack's configuration: the layers must read that same object.
                attention.config = config
        self.post_init()


class _PerLayerStacks:
    """Mixin before a stock class with encoder and decoder: both become per-layer stacks."""

    config_class = PrunedT5Config
    _no_split_modules = ["PrunedT5Block"]  # noqa: RUF012 (the attribute of transformers)

    def __init__(self, config: PrunedT5Config):
        with _layers_hidden(config):
            super().__init__(config)
        for stack, depth in (("encoder", config.num_layers), ("decoder", config.num_decoder_layers)):
            # The configuration that the stock constructor made for this stack, its depth filled in again.
            mine = getattr(self, stack).config
            mine.num_layers, mine.num_decoder_layers = depth, config.num_decoder_layers
            setattr(self, stack, PrunedT5Stack(mine))
        self.post_init()


class PrunedT5Model(_PerLayerStacks, T5Model):
    pass


class PrunedT5ForConditionalGeneration(_PerLayerStacks, T5ForConditionalGeneration):
    pass


# save_pretrained() then writes this file along.
PrunedT5Config.register_for_auto_class()
PrunedT5Model.register_for_auto_class("AutoModel")
PrunedT5ForConditionalGeneration.register_for_auto_class("AutoModelForSeq2SeqLM")
