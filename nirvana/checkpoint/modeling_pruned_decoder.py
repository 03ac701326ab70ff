"""Decoder models whose layers differ in width: the stock classes, built from `config.per_layer_config`.

transformers parses and saves `per_layer_config` (a sparse map from layer index to the attributes that differ there)
but builds no Llama, Mistral, Qwen2 or Qwen3 from it. These classes do: each layer is the stock layer, given its own
resolved configuration. Forward pass, cache, attention back ends and tensor names are the stock ones.

This very file is a module of nirvana and also lies in every checkpoint folder that needs it: `trust_remote_code=True`
opens such a folder where nirvana is not installed. So it imports torch and transformers only. Licence: Apache-2.0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

#: Name of this module inside a checkpoint folder, and version of the configurations that it reads.
FILE, FORMAT = "modeling_pruned_decoder", 1


@contextlib.contextmanager
def layers_hidden(config: PreTrainedConfig) -> Iterator[None]:
    """Inside, `config` has no layers: the stock constructors build embeddings, norm and head, but no layer, which they
    could not size. The very object is changed, not a copy, because they also write to it (attention back end)."""
    overrides, depth = config.__dict__.pop("_heterogeneity_spec", None), config.num_hidden_layers
    config.num_hidden_layers = 0
    try:
        yield
    finally:
        config.num_hidden_layers = depth
        if overrides is not None:
            config._heterogeneity_spec = overrides


class _PerLayerBackbone:
    """Mixin before a stock model class: one stock `layer_class` per layer, each with its own widths."""

    layer_class: type[nn.Module]
    #: Once transformers builds unequal layers itself, it must leave those alone that are built here.
    _disable_heterogeneous_modeling_patching = True

    def __init__(self, config: PreTrainedConfig):
        with layers_hidden(config):
            super().__init__(config)
        self.layers = nn.ModuleList(
            self.layer_class(config.per_layer_config[index], index) for index in range(config.num_hidden_layers)
        )
        for layer in self.layers:
            # set_attn_implementation() changes the model's configuration: the layers must read that same object.
            layer.self_attn.config = config
        # YaRN and dynamic scaling ask the configuration for num_attention_heads, even where head_dim is explicit; any
        # layer's will do, for head_dim is the same in all.
        self.rotary_emb.config = config.per_layer_config[0]
        self.post_init()


class _PerLayerCausalLM:
    """Mixin before a stock class with a language-model head: its backbone becomes `backbone_class`."""

    backbone_class: type[nn.Module]
    _disable_heterogeneous_modeling_patching = True

    def __init__(self, config: PreTrainedConfig):
        with layers_hidden(config):
            super().__init__(config)
        self.model = self.backbone_class(config)
        self.post_init()


class _PerLayerConfig:
    """Mixin before a stock configuration class."""

    def __post_init__(self, **kwargs):
        written = kwargs.pop("pruned_format", FORMAT)
        if written != FORMAT:
            raise ValueError(f"pruned_format {written!r} is not supported, {FORMAT} is; upgrade nirvana")
        super().__post_init__(**kwargs)
        self.pruned_format = FORMAT
        # Which class of this file, copied into every saved folder, serves which Auto class.
        family = type(self).__name__.removesuffix("Config")
        classes = {"AutoConfig": "Config", "AutoModel": "Model", "AutoModelForCausalLM": "ForCausalLM"}
        self.auto_map = {auto: f"{FILE}.{family}{suffix}" for auto, suffix in classes.items()}

    def validate_architecture(self):
        """Replaces the stock check `hidden_size % num_attention_heads == 0`: head_dim is explicit, it need not hold."""
        for index, layer in enumerate(self.per_layer_config):
            heads, groups = layer.num_attention_heads, layer.num_key_value_heads
            if heads % groups:
                raise ValueError(
                    f"layer {index}: num_attention_heads ({heads}) is not a multiple of num_key_value_heads ({groups})"
                )


@strict
class PrunedLlamaConfig(_PerLayerConfig, LlamaConfig):
    model_type = "pruned_llama"


class PrunedLlamaModel(_PerLayerBackbone, LlamaModel):
    config_class = PrunedLlamaConfig
    layer_class = LlamaDecoderLayer


class PrunedLlamaForCausalLM(_PerLayerCausalLM, LlamaForCausalLM):
    config_class = PrunedLlamaConfig
    backbone_class = PrunedLlamaModel


@strict
class PrunedMistralConfig(_PerLayerConfig, MistralConfig):
    model_type = "pruned_mistral"


class PrunedMistralModel(_PerLayerBackbone, MistralModel):
    config_class = PrunedMistralConfig
    layer_class = MistralDecoderLayer


class PrunedMistralForCausalLM(_PerLayerCausalLM, MistralForCausalLM):
    config_class = PrunedMistralConfig
    backbone_class = PrunedMistralModel


@strict
class PrunedQwen2Config(_PerLayerConfig, Qwen2Config):
    model_type = "pruned_qwen2"


class PrunedQwen2Model(_PerLayerBackbone, Qwen2Model):
    config_class = PrunedQwen2Config
    layer_class = Qwen2DecoderLayer


class PrunedQwen2ForCausalLM(_PerLayerCausalLM, Qwen2ForCausalLM):
    config_class = PrunedQwen2Config
    backbone_class = PrunedQwen2Model


@strict
class PrunedQwen3Config(_PerLayerConfig, Qwen3Config):
    model_type = "pruned_qwen3"


class PrunedQwen3Model(_PerLayerBackbone, Qwen3Model):
    config_class = PrunedQwen3Config
    layer_class = Qwen3DecoderLayer


class PrunedQwen3ForCausalLM(_PerLayerCausalLM, Qwen3ForCausalLM):
    config_class = PrunedQwen3Config
    backbone_class = PrunedQwen3Model


#: Configuration, backbone and model with a head of each family.
TYPES = (
    (PrunedLlamaConfig, PrunedLlamaModel, PrunedLlamaForCausalLM),
    (PrunedMistralConfig, PrunedMistralModel, PrunedMistralForCausalLM),
    (PrunedQwen2Config, PrunedQwen2Model, PrunedQwen2ForCausalLM),
    (PrunedQwen3Config, PrunedQwen3Model, PrunedQwen3ForCausalLM),
)
for _config, _backbone, _causal in TYPES:
    # save_pretrained() then writes this file along.
    _config.register_for_auto_class()
    _backbone.register_for_auto_class("AutoModel")
    _causal.register_for_auto_class("AutoModelForCausalLM")
