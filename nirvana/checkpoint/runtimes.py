"""What opens a checkpoint, and what each runtime needs for it: the one place where these facts stand.

They were measured with transformers 5.17 to 5.23, vLLM 0.32 (CPU) and llama.cpp of October 2026; of SGLang and of
tensor parallelism only the source was read, and the text says so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig

from nirvana.architectures import Architecture
from nirvana.architectures.decoder import head_dimension
from nirvana.errors import NirvanaError
from nirvana.parameters import auto_class

PARALLEL_SIZES = (2, 4, 8, 16)


@dataclass(frozen=True)
class Opener:
    """One runtime: whether it opens the checkpoint, and what that takes or what stands against it."""

    runtime: str
    opens: bool
    needs: str


@dataclass(frozen=True)
class Shape:
    """What the runtimes care about.

    Attributes:
        family: as in the plan file ("llama").
        unequal: whether the checkpoint has a type of nirvana's own, for layers that differ in width.
        heads, groups: query and key/value heads of each attention block.
        neurons: width of each MLP.
        code: class file that ``auto_map`` names, where the folder holds it.
    """

    config: PreTrainedConfig
    family: str
    unequal: bool
    heads: tuple[int, ...]
    groups: tuple[int, ...]
    neurons: tuple[int, ...]
    code: str | None

    @classmethod
    def of(cls, architecture: Architecture, code: str | None = None) -> Shape:
        config = architecture.config
        attention = [block for block in architecture.blocks if block.is_attention]
        head_dim = config.d_kv if config.is_encoder_decoder else head_dimension(config)
        return cls(
            config,
            architecture.name,
            config.model_type.startswith("pruned_"),
            tuple(block.size * block.channels // head_dim for block in attention),
            tuple(block.size for block in attention),
            tuple(block.size for block in architecture.blocks if not block.is_attention),
            code,
        )

    @property
    def heads_fill_hidden(self) -> bool:
        """Whether hidden_size / heads is the head dimension, as other projects' Qwen2 classes take for granted."""
        return self.heads[0] * head_dimension(self.config) == self.config.hidden_size


def openers(shape: Shape) -> list[Opener]:
    """Every runtime, in the order of the table that `nirvana check` prints."""
    return [Opener(name, *judge(shape)) for name, judge in RUNTIMES.items()]


def tensor_parallel_sizes(shape: Shape) -> list[int]:
    """Numbers of devices over which every layer can be split, as vLLM splits: of 1, 2, 4, 8 and 16.

    Query heads and neurons are divided; key/value heads are divided, or copied where there are fewer of them.
    """
    sizes = [1]
    for ranks in PARALLEL_SIZES:
        split = all(count % ranks == 0 for count in (*shape.heads, *shape.neurons))
        if split and all(groups % ranks == 0 or ranks % groups == 0 for groups in shape.groups):
            sizes.append(ranks)
    return sizes


def transformers_builds(config: PreTrainedConfig) -> bool:
    """Whether the installed transformers makes a stock model of these per-layer widths by itself.

    Asked of the library and not of its version: today it parses and saves `per_layer_config`, but builds none of these
    families from it. Once it does, a folder opens under the stock `model_type`, and nirvana's classes are not needed.
    """
    settings = config.to_dict()
    stock = CONFIG_MAPPING[config.model_type.removeprefix("pruned_")]
    for key in ("model_type", "auto_map", "architectures", "pruned_format"):
        settings.pop(key, None)
    try:
        with torch.device("meta"):
            theirs = auto_class(config).from_config(stock(**settings)).state_dict()
            ours = auto_class(config).from_config(copy.deepcopy(config)).state_dict()
    except Exception:  # of any kind: it cannot
        return False
    return {name: t.shape for name, t in theirs.items()} == {name: t.shape for name, t in ours.items()}


Verdict = tuple[bool, str]


def _transformers_with_nirvana(shape: Shape) -> Verdict:
    return True, "import nirvana (no trust_remote_code)" if shape.unequal else "nothing"


def _transformers_alone(shape: Shape) -> Verdict:
    if not shape.unequal:
        return True, "nothing"
    if transformers_builds(shape.config):
        stock = shape.family
        return True, f"nothing but model_type {stock!r}: transformers {transformers.__version__} builds these layers"
    if shape.code is None:
        return False, "the class file that auto_map names is missing; write the checkpoint again"
    return True, f"trust_remote_code=True, which runs {shape.code} of this folder"


def _vllm(shape: Shape) -> Verdict:
    if shape.config.is_encoder_decoder:
        return False, "vLLM has no T5"
    if shape.family == "qwen3" and shape.config.attention_bias:
        return False, "vLLM's Qwen3 has no bias at the attention output (attention_bias); use --model-impl transformers"
    if shape.unequal:
        return True, "nirvana installed beside vLLM (plugin; no trust_remote_code)"
    if shape.config.model_type == "qwen2" and not shape.heads_fill_hidden:
        return False, "vLLM's Qwen2 takes head_dim for hidden_size / heads; use --model-impl transformers"
    return True, "nothing"


def _vllm_transformers_backend(shape: Shape) -> Verdict:
    if shape.config.is_encoder_decoder:
        return False, "vLLM has no T5"
    if not shape.unequal:
        return True, "--model-impl transformers"
    if shape.code is None:
        return False, "the class file that auto_map names is missing; write the checkpoint again"
    return True, "--model-impl transformers --trust-remote-code"


def _sglang(shape: Shape) -> Verdict:
    if shape.config.is_encoder_decoder:
        return False, "SGLang has no T5"
    if len(set(shape.groups)) > 1:
        return False, "its cache has one head count for all layers; prune with --scope mlp or --allocation uniform"
    if shape.unequal:
        return False, "unequal MLPs need a model class of your own (SGLANG_EXTERNAL_MODEL_PACKAGE)"
    if shape.config.model_type == "qwen2" and not shape.heads_fill_hidden:
        return False, "Qwen2 classes take head_dim for hidden_size / heads"
    return True, "nothing (from its source, not run)"


def _llama_cpp(shape: Shape) -> Verdict:
    config = shape.config
    if config.is_encoder_decoder:
        return False, "nirvana export writes no GGUF of T5"
    try:
        from nirvana.export.gguf.architecture import choose_layout
        from nirvana.export.gguf.limits import refuse_wrong_results, window
        from nirvana.export.gguf.rope import rope_of
    except ImportError:
        return True, "nirvana export --format gguf, which needs pip install 'nirvana[gguf]'"
    try:
        layout = choose_layout(config, config.tie_word_embeddings)
        refuse_wrong_results(config, layout)
        rope_of(config, layout)
    except NirvanaError as error:
        return False, str(error)
    limit = window(config)
    short = f" --context-length {limit}" if limit is not None and limit < config.max_position_embeddings else ""
    return True, f"nirvana export --format gguf{short} (architecture {layout.name}); {_quantised(shape)}"


def _quantised(shape: Shape) -> str:
    for divisor, forms in ((256, "all quantised forms"), (32, "q8_0 and q4_0 (K-quants need widths of 256)")):
        if all(width % divisor == 0 for width in shape.neurons):
            return forms
    return "MLP output stays f16 when quantised (widths are no multiples of 32; see --align)"


def _onnx(shape: Shape) -> Verdict:
    if shape.config.is_encoder_decoder:
        return False, "nirvana export writes no ONNX of T5"
    return True, "nirvana export --format onnx"


RUNTIMES: dict[str, Callable[[Shape], Verdict]] = {
    "transformers with nirvana": _transformers_with_nirvana,
    "transformers alone": _transformers_alone,
    "vLLM": _vllm,
    "vLLM, Transformers backend": _vllm_transformers_backend,
    "SGLang": _sglang,
    "llama.cpp": _llama_cpp,
    "ONNX Runtime": _onnx,
}
