"""What llama.cpp would compute otherwise than the model, or not open: refused, with the way out."""

from __future__ import annotations

from transformers import PreTrainedConfig

from nirvana.architectures import describe
from nirvana.architectures.decoder import head_dimension
from nirvana.errors import NirvanaError
from nirvana.export.gguf.architecture import OPENELM, QWEN3, Layout, Widths

#: LLAMA_MAX_LAYERS of llama.cpp, which aborts the process above it.
MAX_LAYERS = 512


def check_family(config: PreTrainedConfig) -> None:
    """Raise NirvanaError unless the model is a decoder."""
    if config.is_encoder_decoder:
        raise NirvanaError(
            f"GGUF is written for decoder models, not {describe(config).name}; serve it with transformers"
        )


def refuse_wrong_results(config: PreTrainedConfig, layout: Layout) -> None:
    """Raise NirvanaError where llama.cpp would load the file and compute something else, or not load it at all."""
    widths = Widths.of(config)
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
