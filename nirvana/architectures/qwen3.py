"""Qwen3: head_dim of its own; the q and k norms run over head_dim, are shared by all heads and stay whole."""

from transformers import PreTrainedConfig, Qwen3Config

from nirvana.architectures.decoder import DecoderFamily
from nirvana.checkpoint.modeling_pruned_decoder import PrunedQwen3Config


class Qwen3(DecoderFamily):
    name = "qwen3"
    model_class = "Qwen3ForCausalLM"
    stock_config = Qwen3Config
    pruned_class = PrunedQwen3Config

    def attention_bias(self, config: PreTrainedConfig) -> bool:
        return config.attention_bias


FAMILY = Qwen3()
