"""What can be pruned in each model family. `describe` is the only entry: a configuration or model in, blocks out."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedConfig

from nirvana.architectures import llama, mistral, qwen2, qwen3, seed_oss, t5
from nirvana.architectures.base import KV_GROUP, NEURON, Architecture, Block, Family, Slice
from nirvana.errors import NirvanaError

FAMILIES: dict[str, Family] = {m.FAMILY.name: m.FAMILY for m in (llama, mistral, qwen2, qwen3, seed_oss, t5)}

__all__ = ["FAMILIES", "KV_GROUP", "NEURON", "Architecture", "Block", "Family", "Slice", "describe"]


def describe(model: nn.Module | PreTrainedConfig | Architecture) -> Architecture:
    """The prunable blocks of a model or of its configuration.

    Raises:
        NirvanaError: the family is unknown; the message lists the known ones.
    """
    if isinstance(model, Architecture):
        return model
    config = model if isinstance(model, PreTrainedConfig) else getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    family = FAMILIES.get(str(model_type).removeprefix("pruned_"))
    if family is None:
        raise NirvanaError(f"model family {model_type!r} is not supported; supported are {', '.join(sorted(FAMILIES))}")
    seen = sum(p.numel() for p in model.parameters()) if isinstance(model, nn.Module) else None
    return Architecture(family, config, family.blocks(config), seen)
