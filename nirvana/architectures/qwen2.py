"""Qwen2 and Qwen2.5: q, k and v always have biases, o never has one."""

from transformers import PreTrainedConfig, Qwen2Config, SeedOssConfig

from nirvana.architectures.decoder import DecoderFamily
from nirvana.checkpoint.modeling_pruned_decoder import PrunedQwen2Config


class Qwen2(DecoderFamily):
    name = "qwen2"
    model_class = "Qwen2ForCausalLM"
    stands_in_for = "seed_oss"
    stock_config = Qwen2Config
    pruned_class = PrunedQwen2Config

    def attention_bias(self, config: PreTrainedConfig) -> bool:
        return True

    def uniform_config(self, settings: dict) -> PreTrainedConfig | None:
        # Only transformers reads a head_dim from a qwen2 configuration; vLLM and others take hidden_size / heads. Where
        # that is false, SeedOssConfig says the same function with head_dim, as long as no layer has a sliding window.
        fills = settings["num_attention_heads"] * settings["head_dim"] == settings["hidden_size"]
        if fills or "sliding_attention" in settings["layer_types"]:
            return Qwen2Config(**settings)
        stale = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")
        shared = {key: value for key, value in settings.items() if key not in stale}
        biases = {"attention_bias": True, "attention_out_bias": False, "mlp_bias": False}
        # A Qwen2 configuration may carry such keys too; Qwen2 reads none of them.
        return SeedOssConfig(**(shared | biases | {"residual_dropout": 0.0}))


FAMILY = Qwen2()
