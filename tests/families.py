"""Small random models of every supported family: odd sizes, every GQA ratio, nothing zero that could hide a mistake."""

from __future__ import annotations

import copy
import random

import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    T5Config,
)

from nirvana import PruningPlan, describe
from nirvana.allocation import make_plan
from nirvana.parameters import auto_class

VOCABULARY = 97


def _decoder(config_class: type, hidden: int, heads: int, groups: int, width: int, **more) -> PreTrainedConfig:
    return config_class(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        intermediate_size=width,
        num_hidden_layers=3,
        max_position_embeddings=128,
        tie_word_embeddings=more.pop("tie_word_embeddings", False),
        pad_token_id=0,
        **more,
    )


def _t5(layers: int, decoder_layers: int, heads: int, d_kv: int, width: int, **more) -> T5Config:
    return T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=d_kv,
        num_heads=heads,
        d_ff=width,
        num_layers=layers,
        num_decoder_layers=decoder_layers,
        relative_attention_num_buckets=10,
        relative_attention_max_distance=17,
        decoder_start_token_id=0,
        dropout_rate=0.0,
        **more,
    )


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

#: Between them: query heads per key/value head 1, 3, 4 and 8; biases; tied and own heads; head_dim equal and unequal to
#: hidden_size / heads; sliding windows shorter than the text; relu, silu and gelu MLPs of odd widths.
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": _decoder(LlamaConfig, 48, 12, 4, 37, rope_parameters=LLAMA3_ROPE),
    "llama-biases": _decoder(LlamaConfig, 32, 4, 4, 53, attention_bias=True, mlp_bias=True),
    "llama-tied": _decoder(LlamaConfig, 64, 16, 4, 41, tie_word_embeddings=True),
    "llama-head-dim": _decoder(LlamaConfig, 48, 24, 3, 59, head_dim=6),
    "mistral": _decoder(MistralConfig, 40, 9, 3, 53, head_dim=8, sliding_window=8),
    "qwen2": _decoder(Qwen2Config, 64, 16, 4, 37, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "qwen2-tied": _decoder(Qwen2Config, 24, 3, 3, 43, tie_word_embeddings=True),
    "qwen3": _decoder(Qwen3Config, 40, 12, 4, 53, head_dim=10, attention_bias=True),
    "qwen3-tied": _decoder(Qwen3Config, 32, 24, 3, 61, head_dim=4, tie_word_embeddings=True),
    "t5": _t5(3, 2, 5, 6, 37),
    "t5-gated": _t5(2, 2, 6, 8, 53, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "t5-deep-decoder": _t5(1, 3, 4, 6, 29),
}

ALL = tuple(CONFIGS)
DECODERS = tuple(name for name, config in CONFIGS.items() if not config.is_encoder_decoder)
#: generate() of the stock T5 fails where the decoder is deeper than the encoder.
GENERATING = tuple(name for name in ALL if name != "t5-deep-decoder")


def build(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A random model in evaluation mode: activations of size one, biases, norms and position biases non-zero."""
    model = auto_class(config).from_config(copy.deepcopy(config))
    if config.is_encoder_decoder and not config.scale_decoder_outputs:
        # T5 v1.1 has a head of its own, in its checkpoints; the class ties it at birth.
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            values = 0.5 * values if name.endswith("bias") else 1 + 0.3 * values
        elif name == "shared.weight":
            # Larger ones make a T5 with a tied head repeat its last token for ever.
            values *= 0.4
        elif "relative_attention_bias" not in name:
            # Logits of size one: an absolute tolerance then says something.
            values *= 0.8 / parameter.shape[1] ** 0.5
        parameter.data.copy_(values)
    return model.eval()


def random_plan(model: PreTrainedModel, seed: int) -> PruningPlan:
    """Random units; the kept counts of a kind differ from layer to layer as far as the block sizes allow."""
    rng = random.Random(seed)
    architecture = describe(model)
    kept = {}
    for attention in (True, False):
        used: set[int] = set()
        for block in (b for b in architecture.blocks if b.is_attention == attention):
            every = range(1, block.size + 1)
            count = rng.choice([c for c in every if c not in used] or every)
            used.add(count)
            kept[block.name] = tuple(sorted(rng.sample(range(block.size), count)))
    return make_plan(architecture, kept, {"seed": seed})


def uniform_plan(model: PreTrainedModel, groups: int, neurons: int, seed: int) -> PruningPlan:
    """The same counts in every layer, different units; T5 keeps the same heads where one position bias serves them."""
    rng = random.Random(seed)
    architecture = describe(model)
    kept: dict[str, tuple[int, ...]] = {}
    shared: dict[str, tuple[int, ...]] = {}
    for block in architecture.blocks:
        chosen = tuple(sorted(rng.sample(range(block.size), groups if block.is_attention else neurons)))
        if block.shares_selection_with:
            chosen = shared.setdefault(block.shares_selection_with, chosen)
        kept[block.name] = chosen
    return make_plan(architecture, kept, {"seed": seed})


def inputs(model: PreTrainedModel, seed: int, batch: int = 2, length: int = 19) -> dict[str, Tensor]:
    """Random tokens with left padding in all rows but the first; an encoder-decoder gets decoder tokens as well."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    mask = torch.ones_like(tokens)
    for row in range(1, batch):
        mask[row, : 2 + row] = 0
    result = {"input_ids": tokens.masked_fill(mask == 0, 0), "attention_mask": mask}
    if model.config.is_encoder_decoder:
        result["decoder_input_ids"] = torch.randint(3, VOCABULARY, (batch, length - 6), generator=generator)
    return result


@torch.no_grad()
def logits(model: PreTrainedModel, arguments: dict[str, Tensor]) -> Tensor:
    """Logits at the positions that are not padding: ``[positions, vocabulary]``."""
    output = model(**arguments, use_cache=False).logits
    if model.config.is_encoder_decoder:
        return output.flatten(0, 1)
    return output[arguments["attention_mask"].bool()]
