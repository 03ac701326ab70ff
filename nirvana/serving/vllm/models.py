"""vLLM's own Llama, with layers that differ in width: each is the stock layer, given its own configuration.

Attention is vLLM's PagedAttention; every layer's key/value cache has that layer's number of heads. Llama, Mistral,
Qwen2 and Qwen3 differ only inside the layer: embeddings, final norm, head and the names of the tensors are the same,
so vLLM's Llama carries them all.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

from torch import Tensor, nn
from transformers import PreTrainedConfig
from vllm.config import VllmConfig
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer
from vllm.model_executor.models.utils import extract_layer_index

from nirvana.serving.vllm.prune_at_load import slice_weights


class PrunedLlamaDecoderLayer(LlamaDecoderLayer):
    def __init__(self, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config, prefix, self.layer_config(vllm_config, prefix))

    def layer_config(self, vllm_config: VllmConfig, prefix: str) -> PreTrainedConfig:
        return _layer_config(vllm_config, prefix)


class PrunedQwen2DecoderLayer(PrunedLlamaDecoderLayer):
    """vLLM's own Qwen2 layer takes head_dim to be hidden_size / heads, which is false once heads are gone. The Llama
    layer reads head_dim, and differs from Qwen2's only by the biases of q, k and v."""

    def layer_config(self, vllm_config: VllmConfig, prefix: str) -> PreTrainedConfig:
        config = copy.copy(super().layer_config(vllm_config, prefix))
        config.attention_bias, config.qkv_bias = False, True  # the first is that of o
        return config


class PrunedQwen3DecoderLayer(Qwen3DecoderLayer):
    def __init__(self, vllm_config: VllmConfig, prefix: str = ""):
        config, index = _layer_config(vllm_config, prefix), extract_layer_index(prefix)
        window = config.sliding_window if config.layer_types[index] == "sliding_attention" else None
        super().__init__(
            config, vllm_config.cache_config, vllm_config.quant_config, prefix, per_layer_sliding_window=window
        )


def _layer_config(vllm_config: VllmConfig, prefix: str) -> PreTrainedConfig:
    return vllm_config.model_config.hf_config.per_layer_config[extract_layer_index(prefix)]


class PrunedLlamaForCausalLM(LlamaForCausalLM):
    layer_class: type[nn.Module] = PrunedLlamaDecoderLayer

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        _check_parallel(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=self.layer_class)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return super().load_weights(slice_weights(weights, self.config))


class PrunedMistralForCausalLM(PrunedLlamaForCausalLM):
    """Mistral is Llama with a sliding window, which vLLM takes from the configuration."""


class PrunedQwen2ForCausalLM(PrunedLlamaForCausalLM):
    layer_class = PrunedQwen2DecoderLayer


class PrunedQwen3ForCausalLM(PrunedLlamaForCausalLM):
    layer_class = PrunedQwen3DecoderLayer


def _check_parallel(vllm_config: VllmConfig) -> None:
    """Say which layer cannot be split over the devices; vLLM itself would fail with an assertion without words."""
    ranks = vllm_config.parallel_config.tensor_parallel_size
    for index, layer in enumerate(vllm_config.model_config.hf_config.per_layer_config):
        groups, neurons = layer.num_key_value_heads, layer.intermediate_size
        if layer.num_attention_heads % ranks or (groups % ranks and ranks % groups) or neurons % ranks:
            raise ValueError(
                f"layer {index} has {layer.num_attention_heads} query heads, {groups} key/value heads and {neurons} "
                f"neurons, which --tensor-parallel-size {ranks} does not divide; prune with --tensor-parallel {ranks}"
            )
