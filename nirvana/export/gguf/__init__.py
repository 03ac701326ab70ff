"""GGUF: one file that llama.cpp, ollama, LM Studio and others open, unequal widths included."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from gguf import GGML_QUANT_VERSION, GGUFWriter
from transformers import PreTrainedConfig

from nirvana.architectures.decoder import head_dimension
from nirvana.checkpoint.atomic import atomic_file, check_target
from nirvana.checkpoint.tensors import CheckpointTensors, ModelTensors, TensorSource
from nirvana.export import Exported
from nirvana.export.gguf.architecture import Layout, Widths, choose_layout, is_tied
from nirvana.export.gguf.limits import check_family, context, refuse_wrong_results
from nirvana.export.gguf.rope import Rope, rope_of
from nirvana.export.gguf.tensors import Entry, entries
from nirvana.export.gguf.tokenizer import vocabulary_of
from nirvana.export.gguf.types import TYPES, GGMLQuantizationType, check_type, tensor_type
from nirvana.export.gguf.write import file_bytes, write_file
from nirvana.models import ModelSource, resolve
from nirvana.parameters import check_tensors
from nirvana.progress import Progress


def export_gguf(
    source: str | Path,
    out: str | Path,
    *,
    type: str = "f16",  # noqa: A002 (the name of the option)
    context_length: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write a model as GGUF, with its tokenizer and chat template, one tensor in memory at a time.

    Layers of unequal width are written for llama.cpp's architecture `deci` (Llama, Mistral, Qwen2) or `openelm` (Qwen3
    with tied embeddings), equal ones for `llama`, `qwen2` and `qwen3`.

    Args:
        source: checkpoint folder, Hub id, .gguf file or "demo".
        out: the file to make; it appears whole or not at all.
        type: of the matrices: "f16", "f32", "bf16", "q8_0", "q5_1", "q5_0", "q4_1" or "q4_0".
        context_length: what the file announces; None takes the model's own.
        overwrite: replace a file at `out`.
        progress: told the bytes written.

    Raises:
        NirvanaError: `out` or `type` is refused, the checkpoint is damaged, or llama.cpp would not compute this model
            or not make its token ids; the message says why and what else can be done.
    """
    kind = check_type(type)
    check_target(out, overwrite)
    model = resolve(source)
    config = model.config()
    check_family(config)
    length = context(config, context_length)
    tensors = _tensors(model)
    tied = is_tied(config, tensors)
    layout = choose_layout(config, tied)
    refuse_wrong_results(config, layout)
    rope = rope_of(config, layout)
    vocabulary = vocabulary_of(model.tokenizer(), config, model.generation_config())
    typed = [
        (entry, tensor_type(entry.shape, TYPES[kind][0], entry.is_output))
        for entry in entries(tensors, config, layout, rope, tied)
    ]
    stage = (progress or Progress()).stage("export", sum(file_bytes(*pair) for pair in typed), "B")
    with atomic_file(out, overwrite) as partial:
        writer = GGUFWriter(None, layout.name)
        _add_keys(writer, model, config, layout, rope, length, kind)
        vocabulary.add_keys(writer)
        with stage as advance:
            write_file(partial, writer, typed, advance)
    counts = Counter(used.name for _, used in typed)
    details = {
        "architecture": layout.name,
        "types": ", ".join(f"{count} {name}" for name, count in counts.most_common()),
        "tokenizer": f"{vocabulary.model} ({vocabulary.pre}), {len(vocabulary.tokens):,} tokens",
        "context": f"{length:,}",
    }
    return Exported(Path(out).absolute(), "gguf", details, (*vocabulary.notes, *_type_notes(typed, TYPES[kind][0])))


def _tensors(model: ModelSource) -> TensorSource:
    if model.gguf:
        return ModelTensors(model.model(device="cpu"))
    tensors = CheckpointTensors(model.folder())
    check_tensors(tensors.info(), model.config())
    return tensors


def _add_keys(
    writer: GGUFWriter,
    model: ModelSource,
    config: PreTrainedConfig,
    layout: Layout,
    rope: Rope,
    context_length: int,
    kind: str,
) -> None:
    """Everything that llama.cpp reads but the tokenizer."""
    widths, head_dim = Widths.of(config), head_dimension(config)

    def per_layer(values: tuple[int, ...]) -> int | list[int]:
        return values[0] if widths.uniform else list(values)

    writer.add_type("model")
    writer.add_name(Path(model.name).name or model.name)
    writer.add_file_type(TYPES[kind][1])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(widths.heads))
    writer.add_feed_forward_length(per_layer(widths.neurons))
    writer.add_head_count(per_layer(widths.heads))
    writer.add_head_count_kv(per_layer(widths.groups))
    # Without these llama.cpp divides the hidden size by the heads of layer 0.
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope.add_keys(writer, head_dim)


def _type_notes(typed: list[tuple[Entry, GGMLQuantizationType]], wanted: GGMLQuantizationType) -> list[str]:
    """What stays wider than asked, because its rows do not divide into blocks."""
    odd = [entry for entry, used in typed if len(entry.shape) > 1 and entry.shape[-1] % 32 and used != wanted]
    if not odd:
        return []
    widths = sorted({entry.shape[-1] for entry in odd})
    shown = ", ".join(map(str, widths[:4])) + (", ..." if len(widths) > 4 else "")
    return [
        f"{len(odd)} tensors stay F16: their rows ({shown}) do not divide into blocks of 32; "
        f"the first is {odd[0].name}, prune with --align 32 for all in {wanted.name}"
    ]
