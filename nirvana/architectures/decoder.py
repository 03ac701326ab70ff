"""Decoder families with grouped-query attention and a gated MLP under the tensor names of Llama.

A family file says which of its linear layers have biases and which classes hold equal and unequal widths; the rest is
the same for all of them and stands here.
"""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedConfig

from nirvana.architectures.base import KV_GROUP, NEURON, Block, Family, Slice, plain_settings


class DecoderFamily(Family):
    #: Configuration class of the stock model.
    stock_config: type[PreTrainedConfig]
    #: Configuration class of the model whose layers differ in width.
    pruned_class: type[PreTrainedConfig]

    def attention_bias(self, config: PreTrainedConfig) -> bool:
        """Whether q, k and v have biases. A bias of o or down belongs to no unit and stays whole."""
        return False

    def mlp_bias(self, config: PreTrainedConfig) -> bool:
        """Whether gate and up have biases."""
        return False

    def uniform_config(self, settings: dict) -> PreTrainedConfig | None:
        """A stock configuration for equal widths in all layers, or None where no stock class can express it."""
        return self.stock_config(**settings)

    def blocks(self, config: PreTrainedConfig) -> tuple[Block, ...]:
        blocks = []
        for index, layer in enumerate(config.per_layer_config):
            prefix = f"model.layers.{index}"
            blocks.append(self._attention(f"{prefix}.self_attn", layer))
            blocks.append(self._mlp(f"{prefix}.mlp", layer))
        return tuple(blocks)

    def _attention(self, name: str, layer: PreTrainedConfig) -> Block:
        groups, hidden, head_dim = layer.num_key_value_heads, layer.hidden_size, head_dimension(layer)
        # In HF order query head h reads key/value head h // ratio: the query heads of a group are consecutive rows.
        queries = layer.num_attention_heads // groups
        heads = {"q_proj": queries, "k_proj": 1, "v_proj": 1}
        slices = [Slice(f"{name}.{part}.weight", 0, n * head_dim, hidden, heads=n) for part, n in heads.items()]
        slices.append(Slice(f"{name}.o_proj.weight", 1, queries * head_dim, hidden, heads=queries))
        if self.attention_bias(layer):
            slices += [Slice(f"{name}.{part}.bias", 0, n * head_dim, heads=n) for part, n in heads.items()]
        return Block(name, KV_GROUP, groups, tuple(slices), f"{name}.o_proj", queries * head_dim)

    def _mlp(self, name: str, layer: PreTrainedConfig) -> Block:
        hidden = layer.hidden_size
        slices = [Slice(f"{name}.{part}.weight", 0, 1, hidden) for part in ("gate_proj", "up_proj")]
        slices.append(Slice(f"{name}.down_proj.weight", 1, 1, hidden))
        if self.mlp_bias(layer):
            slices += [Slice(f"{name}.{part}.bias", 0, 1) for part in ("gate_proj", "up_proj")]
        return Block(name, NEURON, layer.intermediate_size, tuple(slices), f"{name}.down_proj", 1)

    def pruned_config(
        self, config: PreTrainedConfig, blocks: tuple[Block, ...], kept: Mapping[str, tuple[int, ...]]
    ) -> PreTrainedConfig:
        layers = []
        for layer, attention, mlp in zip(config.per_layer_config, blocks[::2], blocks[1::2], strict=True):
            groups = len(kept[attention.name])
            ratio = layer.num_attention_heads // layer.num_key_value_heads
            layers.append(
                {
                    "num_attention_heads": groups * ratio,
                    "num_key_value_heads": groups,
                    "intermediate_size": len(kept[mlp.name]),
                }
            )
        settings = plain_settings(config)
        settings["head_dim"] = head_dimension(config)
        for attribute, first in layers[0].items():
            if all(layer[attribute] == first for layer in layers):
                settings[attribute] = first
        if all(layer == layers[0] for layer in layers):
            stock = self.uniform_config(settings)
            if stock is not None:
                stock.architectures = [causal_model_class(stock)]
                return stock
        pruned = self.pruned_class(**settings, per_layer_config=dict(enumerate(layers)))
        pruned.architectures = [causal_model_class(pruned)]
        return pruned


def head_dimension(config: PreTrainedConfig) -> int:
    """Channels per head. Qwen3 and pruned models set it apart from hidden_size / heads, so the field comes first."""
    explicit = getattr(config, "head_dim", None)
    return explicit if explicit is not None else config.hidden_size // config.num_attention_heads


def causal_model_class(config: PreTrainedConfig) -> str:
    """Name of the class with a language-model head for a configuration: transformers' or, for Pruned..., nirvana's."""
    return type(config).__name__.removesuffix("Config") + "ForCausalLM"
