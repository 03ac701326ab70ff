"""T5 v1.0 (plain MLP) and v1.1 / Flan-T5 (gated MLP): encoder, decoder and cross-attention are blocks of their own.

T5 has no grouped queries: a KV group is one head. The relative-position bias has one column per head, lives in the
first block of each stack and serves all of them: each kept head takes its column along (see modeling_pruned_t5.py).
"""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedConfig, T5Config

from nirvana.architectures.base import KV_GROUP, NEURON, Block, Family, Slice, plain_settings
from nirvana.checkpoint.modeling_pruned_t5 import PrunedT5Config


class T5(Family):
    name = "t5"
    model_class = "T5ForConditionalGeneration"

    def blocks(self, config: PreTrainedConfig) -> tuple[Block, ...]:
        blocks = []
        for stack, depth in (("encoder", config.num_layers), ("decoder", config.num_decoder_layers)):
            for index in range(depth):
                layer = _layer_config(config, stack, index)
                prefix = f"{stack}.block.{index}.layer"
                blocks.append(_self_attention(config, layer, stack, index))
                if stack == "decoder":
                    heads = getattr(layer, "cross_num_heads", layer.num_heads)
                    blocks.append(_attention(config, f"{prefix}.1.EncDecAttention", heads, "cross"))
                blocks.append(_mlp(config, f"{prefix}.{1 if stack == 'encoder' else 2}.DenseReluDense", layer.d_ff))
        return tuple(blocks)

    def pruned_config(
        self, config: PreTrainedConfig, blocks: tuple[Block, ...], kept: Mapping[str, tuple[int, ...]]
    ) -> PreTrainedConfig:
        settings = plain_settings(config)
        for stack in ("encoder", "decoder"):
            settings.pop(f"per_layer_{stack}_config", None)
        if not _is_pruned(config) and _fits_stock(blocks, kept):
            heads = next(len(kept[b.name]) for b in blocks if b.is_attention)
            width = next(len(kept[b.name]) for b in blocks if not b.is_attention)
            stock = T5Config(**{**settings, "num_heads": heads, "d_ff": width})
            stock.architectures = [self.model_class]
            return stock
        layers: dict[str, dict[str, dict[str, int]]] = {"encoder": {}, "decoder": {}}
        for block in blocks:
            stack, _, index, *_ = block.name.split(".")
            kind = "d_ff" if not block.is_attention else "num_heads"
            if block.name.endswith("EncDecAttention"):
                kind = "cross_num_heads"
            layers[stack].setdefault(index, {})[kind] = len(kept[block.name])
        pruned = PrunedT5Config(
            **settings, per_layer_encoder_config=layers["encoder"], per_layer_decoder_config=layers["decoder"]
        )
        pruned.architectures = [f"Pruned{self.model_class}"]
        return pruned


def _is_pruned(config: PreTrainedConfig) -> bool:
    """By name, not by class: a checkpoint that was opened by its own file brings a class of its own."""
    return config.model_type == PrunedT5Config.model_type


def _layer_config(config: PreTrainedConfig, stack: str, index: int) -> PreTrainedConfig:
    return config.layer_config(stack, index) if _is_pruned(config) else config


def _attention(config: PreTrainedConfig, name: str, heads: int, kind: str, *more: Slice, label: str = "") -> Block:
    slices = [Slice(f"{name}.{part}.weight", 0, config.d_kv, config.d_model) for part in "qkv"]
    slices.append(Slice(f"{name}.o.weight", 1, config.d_kv, config.d_model))
    return Block(name, KV_GROUP, heads, (*slices, *more), f"{name}.o", config.d_kv, label, kind)


def _self_attention(config: PreTrainedConfig, layer: PreTrainedConfig, stack: str, index: int) -> Block:
    name = f"{stack}.block.{index}.layer.0.SelfAttention"
    table = f"{name}.relative_attention_bias.weight"
    # A stock model has one table a stack; one that was pruned before has a table in each layer.
    source = table
    if not _is_pruned(config):
        source = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    bias = Slice(table, 1, 1, config.relative_attention_num_buckets, source=source, scored=False)
    return _attention(config, name, layer.num_heads, stack, bias, label=f"{stack} position bias")


def _mlp(config: PreTrainedConfig, name: str, width: int) -> Block:
    rows = ("wi_0", "wi_1") if config.is_gated_act else ("wi",)
    slices = [Slice(f"{name}.{part}.weight", 0, 1, config.d_model) for part in rows]
    slices.append(Slice(f"{name}.wo.weight", 1, 1, config.d_model))
    return Block(name, NEURON, width, tuple(slices), f"{name}.wo", 1)


def _fits_stock(blocks: tuple[Block, ...], kept: Mapping[str, tuple[int, ...]]) -> bool:
    """Stock T5 holds one head count, one MLP width, and one position bias a stack: the same heads in all its layers."""
    heads = {len(kept[b.name]) for b in blocks if b.is_attention}
    widths = {len(kept[b.name]) for b in blocks if not b.is_attention}
    selections: dict[str, set[tuple[int, ...]]] = {}
    for block in blocks:
        if block.shares_selection_with:
            selections.setdefault(block.shares_selection_with, set()).add(kept[block.name])
    return len(heads) == len(widths) == 1 and all(len(chosen) == 1 for chosen in selections.values())


FAMILY = T5()
