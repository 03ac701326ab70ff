"""Rotary embeddings with scaled frequencies, as llama.cpp reads them.

`linear` and `yarn` are computed by llama.cpp itself from a few keys, for every architecture. `llama3` is a tensor of
divisors of the frequencies, which only some architectures read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from gguf import GGUFWriter, RopeScalingType
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nirvana.architectures.decoder import head_dimension
from nirvana.errors import NirvanaError
from nirvana.export.gguf.architecture import Layout

#: What llama.cpp computes YaRN with; a file cannot say otherwise for the architectures that are written here.
YARN_FIXED = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "mscale": None, "mscale_all_dim": None}


@dataclass(frozen=True)
class Rope:
    """Base frequency, scaling (none, "linear" or "yarn") and, for llama3, fp32 divisors ``[head_dim / 2]``."""

    base: float
    scaling: str | None = None
    factor: float = 1.0
    original_context: int | None = None
    attention_factor: float = 1.0
    divisors: Tensor | None = None

    def add_keys(self, writer: GGUFWriter, head_dim: int) -> None:
        writer.add_rope_dimension_count(head_dim)
        writer.add_rope_freq_base(self.base)
        if self.scaling is None:
            return
        writer.add_rope_scaling_type(RopeScalingType(self.scaling))
        writer.add_rope_scaling_factor(self.factor)
        if self.original_context is not None:
            writer.add_rope_scaling_orig_ctx_len(self.original_context)
        if self.attention_factor != 1.0:
            writer.add_rope_scaling_attn_factors(self.attention_factor)


def rope_of(config: PreTrainedConfig, layout: Layout) -> Rope:
    """What the configuration says, in llama.cpp's terms.

    Raises:
        NirvanaError: a kind of scaling that llama.cpp does not compute, or not in this architecture.
    """
    settings = config.rope_parameters
    kind, base = settings.get("rope_type", "default"), float(settings["rope_theta"])
    if settings.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise NirvanaError(
            f"partial_rotary_factor is {settings['partial_rotary_factor']}, llama.cpp's {layout.name} turns every "
            "channel; use --format onnx"
        )
    if kind == "default":
        return Rope(base)
    if kind == "linear":
        return Rope(base, "linear", float(settings["factor"]))
    if kind == "yarn":
        return _yarn(settings, base)
    if kind == "llama3" and layout.rope_factors:
        return Rope(base, divisors=_divisors(config, base))
    reader = "llama.cpp does not compute it" if kind != "llama3" else f"llama.cpp's {layout.name} does not read it"
    raise NirvanaError(f"the model scales its rotary embeddings by {kind!r}: {reader}; use --format onnx")


def _yarn(settings: dict[str, Any], base: float) -> Rope:
    for name, value in YARN_FIXED.items():
        if settings.get(name) not in (None, value):
            raise NirvanaError(
                f"yarn with {name} {settings[name]}: llama.cpp computes it with {value}; use --format onnx"
            )
    factor = settings.get("factor")
    if factor is None or factor < 1:
        raise NirvanaError(f"yarn with factor {factor}: llama.cpp needs one of at least 1")
    usual = 0.1 * math.log(factor) + 1
    attention = settings.get("attention_factor")
    return Rope(
        base,
        "yarn",
        float(factor),
        int(settings["original_max_position_embeddings"]),
        1.0 if attention is None else attention / usual,
    )


def _divisors(config: PreTrainedConfig, base: float) -> Tensor:
    """By how much transformers divides each frequency."""
    dimension = head_dimension(config)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config.per_layer_config[0], torch.device("cpu"))
    plain = 1.0 / base ** (torch.arange(0, dimension, 2, dtype=torch.int64).float() / dimension)
    return (plain / scaled).float()
