"""Checkpoint -> a folder with an ONNX model that ONNX Runtime executes, nirvana and torch not installed."""

from __future__ import annotations

import copy
import importlib.util
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from nirvana.checkpoint.atomic import atomic_directory, check_target
from nirvana.checkpoint.save import save_tokenizer
from nirvana.errors import NirvanaError
from nirvana.models import ModelSource, resolve
from nirvana.progress import Progress

if TYPE_CHECKING:
    import onnx_ir

MODEL = "model.onnx"
WEIGHTS = "model.onnx_data"
#: Standalone; it travels with the model.
LOOP = Path(__file__).with_name("generate.py")
#: Types that ONNX Runtime computes with on every device. Its CPU kernels know no bfloat16.
DTYPES = ("float32", "float16")
#: A protobuf message ends at 2 GiB: with more weights than this they go to a file of their own.
EMBEDDED_BYTES = 1_900_000_000


def export_onnx(
    source: str | Path,
    out: str | Path,
    *,
    cache: bool = True,
    dtype: str = "float32",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Export a decoder, pruned or not, its layers of equal or unequal widths.

    The graph has the inputs `input_ids`, `attention_mask` and `position_ids` (int64, ``[batch, tokens]``; the mask
    covers past and new tokens) and the output `logits`. With `cache` it has also `past_key_values.N.key` and `.value`,
    ``[batch, key/value heads of layer N, past tokens, head_dim]``, which may hold 0 tokens, and returns them grown as
    `present.N.key` and `.value`. The optional input `num_logits_to_keep` (int64 scalar) asks for the logits of that
    many last tokens; left out, or 0, it asks for all.

    Args:
        source: checkpoint folder, Hub id, .gguf file or "demo".
        out: folder to make: model.onnx (weights above 1.9 GB in model.onnx_data), config.json, generation defaults,
            tokenizer, and generate.py, a greedy loop that needs onnxruntime, numpy and tokenizers only.
        cache: with the past as inputs; without it every call computes the whole text.
        dtype: "float32" whatever the checkpoint holds, or "float16".
        overwrite: replace an older export at `out`.
        progress: told the three steps: load, trace, write.

    Returns:
        Absolute path of the folder, which appears whole or not at all.

    Raises:
        NirvanaError: not a decoder, `out` refused, or packages missing.
    """
    _require_packages()
    if dtype not in DTYPES:
        raise NirvanaError(f"ONNX in type {dtype!r} is not possible; use one of {', '.join(DTYPES)}")
    check_target(out, overwrite, directory=True)
    described = resolve(source)
    described.refuse_as_target(out)
    config = described.config()
    if config.is_encoder_decoder:
        raise NirvanaError(
            f"{str(source)!r} is of type {config.model_type}, an encoder-decoder; ONNX export knows decoders only, "
            "so serve it with transformers"
        )
    with (progress or Progress()).stage("export", 3) as advance:
        model = described.model(dtype, "cpu")
        advance(1)
        # Loaded here only: the packages may be missing.
        from nirvana.export.onnx.trace import trace

        graph = trace(model, cache)
        advance(1)
        with atomic_directory(out, overwrite) as folder:
            _save(graph, folder)
            _save_companions(described, model.config, folder)
        advance(1)
    return Path(out).absolute()


def _require_packages() -> None:
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise NirvanaError(f"ONNX export needs {' and '.join(missing)}: pip install 'nirvana[onnx]'")


def _save(model: onnx_ir.Model, folder: Path) -> None:
    import onnx_ir

    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    onnx_ir.save(model, folder / MODEL, external_data=WEIGHTS if size > EMBEDDED_BYTES else None)


def _save_companions(source: ModelSource, config: object, folder: Path) -> None:
    """Configuration, generation defaults, tokenizer and loop."""
    config = copy.deepcopy(config)
    # The class file does not come along: there are no weights for it here.
    config._auto_class = None
    if hasattr(config, "auto_map"):
        del config.auto_map
    config.save_pretrained(folder)
    generation_config = source.generation_config()
    if generation_config is not None:
        generation_config.save_pretrained(folder)
    tokenizer = source.tokenizer()
    if tokenizer is not None:
        save_tokenizer(tokenizer, folder)
    shutil.copy(LOOP, folder / LOOP.name)
