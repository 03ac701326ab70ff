"""Which of llama.cpp's architectures computes a model, and which models none of them does.

llama.cpp reads per-layer head counts and MLP widths for every architecture, but most create their tensors with the
sizes of layer 0. `deci` and `openelm` go by the layer in loader and graph (llama.cpp of 2024-12 and later).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from nirvana.architectures import describe
from nirvana.architectures.decoder import head_dimension
from nirvana.checkpoint.tensors import TensorSource
from nirvana.errors import NirvanaError

#: LLAMA_MAX_LAYERS of llama.cpp, which aborts the process above it.
MAX_LAYERS = 512

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


def check_family(config: PreTrainedConfig) -> None:
    """Raise NirvanaError unless the model is a decoder."""
    if config.is_encoder_decoder:
        raise NirvanaError(
            f"GGUF is written for decoder models, not {describe(config).name}; serve it with transformers"
        )


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
    layout = _layout(family, config, widths, tied)
    _refuse_wrong_results(config, layout, widths)
    return layout


def _layout(family: str, config: PreTrainedConfig, widths: Widths, tied: bool) -> Layout:
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


def _refuse_wrong_results(config: PreTrainedConfig, layout: Layout, widths: Widths) -> None:
    """What llama.cpp would load and then compute differently, or not load at all."""
    if config.hidden_act != "silu":
        raise NirvanaError(
            f"llama.cpp's {layout.name} computes silu, the model's hidden_act is {config.hidden_act!r}; "
            "use --format onnx"
        )
    for index, (heads, neurons) in enumerate(zip(widths.heads, widths.neurons, strict=True)):
        if heads < 1 or neurons < 1:  # deci drops the attention of a layer without MLP, silently
            raise NirvanaError(
                f"layer {index} has {heads} heads and {neurons} neurons, llama.cpp computes such a layer wrongly; "
                "keep at least one of each"
            )
    if len(widths.heads) > MAX_LAYERS:
        raise NirvanaError(f"the model has {len(widths.heads)} layers, llama.cpp opens at most {MAX_LAYERS}")
    if head_dimension(config) % 2:
        raise NirvanaError(f"head_dim {head_dimension(config)} is odd, which llama.cpp's RoPE cannot turn")
    if layout in (QWEN3, OPENELM) and config.attention_bias:
        raise NirvanaError(
            f"llama.cpp's {layout.name} reads no bias of attn_output, the model has attention_bias; use --format onnx"
        )
    if getattr(config, "quantization_config", None):
        raise NirvanaError("the checkpoint is quantised; export the unquantised one and choose --type")


def window(config: PreTrainedConfig) -> int | None:
    """The sliding window of any layer. None of the architectures above has one: they attend to everything."""
    if describe(config).name == "llama":
        return None  # a configuration may carry the field along, Llama does not read it
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    return getattr(config, "sliding_window", None)


def context(config: PreTrainedConfig, asked: int | None) -> int:
    """The context length that the file announces.

    Raises:
        NirvanaError: longer than the model's, or longer than its sliding window, which llama.cpp would ignore.
    """
    longest = config.max_position_embeddings
    length = longest if asked is None else asked
    if not 1 <= length <= longest:
        raise NirvanaError(f"--context-length {length} must be between 1 and the model's {longest}")
    limit = window(config)
    if limit is not None and length > limit:
        raise NirvanaError(
            f"the model attends to {limit} tokens only (sliding window), llama.cpp to its whole context of {length}; "
            f"pass --context-length {limit}, up to which both are the same"
        )
    return length
