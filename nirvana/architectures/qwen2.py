"""Qwen2 and Qwen2.5: q, k and v always have biases, o never has one."""

from transformers import PreTrainedConfig, Qwen2Config

from nirvana.architectures.decoder import DecoderFamily
from nirvana.checkpoint.modeling_pruned_decoder import PrunedQwen2Config


class Qwen2(DecoderFamily):
    name = "qwen2"
    model_class = "Qwen2ForCausalLM"
    stock_config = Qwen2Config
    pruned_class = PrunedQwen2Config

    def attention_bias(self, config: PreTrainedConfig) -> bool:
        return True


FAMILY = Qwen2()
