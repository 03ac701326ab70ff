"""Seed-OSS: Qwen2's function with an explicit head_dim, so the type under which head-pruned Qwen2 is written.

Readers outside of transformers take Qwen2's head_dim for hidden_size / heads, which is false once heads are gone.
"""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedConfig, SeedOssConfig

from nirvana.architectures.base import Block
from nirvana.architectures.decoder import DecoderFamily
from nirvana.checkpoint.modeling_pruned_decoder import PrunedQwen2Config
from nirvana.errors import NirvanaError


class SeedOss(DecoderFamily):
    name = "seed_oss"
    model_class = "SeedOssForCausalLM"
    stands_in_for = "qwen2"
    stock_config = SeedOssConfig
    pruned_class = PrunedQwen2Config

    def attention_bias(self, config: PreTrainedConfig) -> bool:
        return config.attention_bias

    def mlp_bias(self, config: PreTrainedConfig) -> bool:
        return config.mlp_bias

    def pruned_config(
        self, config: PreTrainedConfig, blocks: tuple[Block, ...], kept: Mapping[str, tuple[int, ...]]
    ) -> PreTrainedConfig:
        pruned = super().pruned_config(config, blocks, kept)
        qwen2 = (config.attention_bias, config.attention_out_bias, config.mlp_bias) == (True, False, False)
        if isinstance(pruned, PrunedQwen2Config) and not qwen2:
            raise NirvanaError("a Seed-OSS with other biases than q, k and v needs --allocation uniform")
        return pruned


FAMILY = SeedOss()
