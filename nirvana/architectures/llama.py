"""Llama 1, 2, 3.x and models of the same shape (SmolLM, TinyLlama)."""

from transformers import LlamaConfig, MistralConfig, PreTrainedConfig

from nirvana.architectures.decoder import DecoderFamily
from nirvana.checkpoint.modeling_pruned_decoder import PrunedLlamaConfig


class Llama(DecoderFamily):
    name = "llama"
    model_class = "LlamaForCausalLM"
    stock_config = LlamaConfig
    pruned_class = PrunedLlamaConfig

    def attention_bias(self, config: PreTrainedConfig) -> bool:
        return config.attention_bias

    def mlp_bias(self, config: PreTrainedConfig) -> bool:
        return config.mlp_bias

    def uniform_config(self, settings: dict) -> PreTrainedConfig | None:
        # LlamaConfig refuses head counts that do not divide the hidden size although head_dim is explicit (28 of 32
        # heads of an 8B model). MistralConfig does not, and without a sliding window computes the same function.
        if settings["hidden_size"] % settings["num_attention_heads"] == 0:
            return LlamaConfig(**settings)
        if settings["attention_bias"] or settings["mlp_bias"]:
            return None
        shared = {k: v for k, v in settings.items() if k not in ("attention_bias", "mlp_bias", "pretraining_tp")}
        return MistralConfig(**shared | {"sliding_window": None})


FAMILY = Llama()
