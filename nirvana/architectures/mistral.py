"""Mistral: Llama's blocks without biases, with a sliding window that pruning does not touch."""

from transformers import MistralConfig

from nirvana.architectures.decoder import DecoderFamily
from nirvana.checkpoint.modeling_pruned_decoder import PrunedMistralConfig


class Mistral(DecoderFamily):
    name = "mistral"
    model_class = "MistralForCausalLM"
    stands_in_for = "llama"
    stock_config = MistralConfig
    pruned_class = PrunedMistralConfig


FAMILY = Mistral()
