"""Which of llama.cpp's architectures computes a model, and which models none of them does.

llama.cpp reads per-layer head counts and MLP widths for every architecture, but most create their tensors with the
sizes of layer 0. `deci` and `openelm` go by the layer in loader and graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from nirvana.architectures import describe
from nirvana.architectures.decoder import head_dimension
from nirvana.checkpoint.tensors import TensorSource
from nirvana.errors import NirvanaError

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Layout:
    """What a llama.cpp architecture expects of the tensors.

    Attributes:
        name: `general.architecture`.
        interleaved: RoPE turns neighbouring channels (NORM), transformers turns halves (NEOX): q and k are permuted.
        fused: q, k and v are one tensor.
        rope_factors: it reads `rope_freqs.weight`.
        biases: the linear layers whose bias it reads.
    """

    name: str
    interleaved: bool = False
    fused: bool = False
    rope_factors: bool = False
    biases: tuple[str, ...] = ()


_QKV = ("q_proj", "k_proj", "v_proj")
_ALL = (*_QKV, "o_proj", "gate_proj", "up_proj", "down_proj")

LLAMA = Layout("llama", interleaved=True, rope_factors=True, biases=_ALL)
DECI = Layout("deci", interleaved=True, rope_factors=True, biases=_ALL)
QWEN2 = Layout("qwen2", biases=_QKV)
QWEN3 = Layout("qwen3", biases=_QKV)
OPENELM = Layout("openelm", fused=True)


@dataclass(frozen=True)
class Widths:
    """Per layer: query heads, key/value heads, MLP neurons."""

    heads: tuple[int, ...]
    groups: tuple[int, ...]
    neurons: tuple[int, ...]

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Widths:
        layers = list(config.per_layer_config)
        return cls(
            tuple(layer.num_attention_heads for layer in layers),
            tuple(layer.num_key_value_heads for layer in layers),
            tuple(layer.intermediate_size for layer in layers),
        )

    @property
    def uniform(self) -> bool:
        return all(len(set(values)) == 1 for values in (self.heads, self.groups, self.neurons))


def is_tied(config: PreTrainedConfig, source: TensorSource) -> bool:
    """Whether the embeddings also make the logits: as transformers, which unties two tensors of different values."""
    if not config.tie_word_embeddings:
        return False
    both = (EMBEDDINGS, HEAD)
    return not all(name in source.info() for name in both) or torch.equal(*map(source.load, both))


def choose_layout(config: PreTrainedConfig, tied: bool) -> Layout:
    """The architecture that computes this model exactly.

    Args:
        tied: see `is_tied`.

    Raises:
        NirvanaError: there is none; the message says why and names the way out.
    """
    family = describe(config).name
    widths = Widths.of(config)
    if family == "qwen3":
        if widths.uniform:
            return QWEN3
        if not tied:
            raise NirvanaError(
                "llama.cpp has no architecture for a Qwen3 of unequal widths whose head is not tied to the embeddings; "
                "prune with --allocation uniform, or use --format onnx"
            )
        return OPENELM
    if not widths.uniform:
        return DECI
    if family not in ("qwen2", "seed_oss"):
        return LLAMA
    # llama.cpp's qwen2 takes heads x head_dim for the hidden size and reads neither rope_freqs nor other biases than
    # those of q, k and v; deci does all of it.
    square = widths.heads[0] * head_dimension(config) == config.hidden_size
    more_biases = getattr(config, "attention_out_bias", False) or getattr(config, "mlp_bias", False)
    return QWEN2 if square and not more_biases and config.rope_parameters["rope_type"] != "llama3" else DECI
