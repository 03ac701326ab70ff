"""What can be pruned in a model, said in tensors: blocks, units and the slices that belong to a unit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

KV_GROUP = "kv_group"
NEURON = "neuron"


@dataclass(frozen=True)
class Slice:
    """The part of one tensor that belongs to a block's units: `unit` consecutive rows or columns for each unit.

    Attributes:
        tensor: full name of the tensor in the checkpoint, e.g. ``model.layers.0.mlp.up_proj.weight``.
        axis: 0 when a unit owns rows (or entries of a bias), 1 when it owns columns.
        unit: consecutive rows or columns per unit.
        width: length of the other axis; 0 for a bias. `unit * width` parameters belong to each unit.
        source: name of the tensor it is cut from, where that differs from `tensor` (T5's shared position bias).
        scored: whether |gradient x weight| of this tensor counts for the unit.
        heads: attention heads of the unit in this tensor: several where query heads share a key/value head.
    """

    tensor: str
    axis: int
    unit: int
    width: int = 0
    source: str = ""
    scored: bool = True
    heads: int = 1

    @property
    def source_tensor(self) -> str:
        return self.source or self.tensor


@dataclass(frozen=True)
class Block:
    """One prunable sub-layer: an MLP, a self-attention or a cross-attention.

    Attributes:
        name: module path, e.g. ``model.layers.0.self_attn``.
        unit: ``"kv_group"`` or ``"neuron"``.
        size: number of units.
        slices: everything that is cut when units are removed.
        output: path of the linear layer whose *input* the units write (o_proj, down_proj): masking happens there.
        channels: channels of that input per unit.
        shares_selection_with: blocks with the same non-empty label must keep the same units in a stock checkpoint,
            because one tensor serves them all (T5's relative-position bias).
        attention_kind: "encoder", "decoder" (self-attention) or "cross" in an encoder-decoder; empty elsewhere.
    """

    name: str
    unit: str
    size: int
    slices: tuple[Slice, ...]
    output: str
    channels: int
    shares_selection_with: str = ""
    attention_kind: str = ""

    @property
    def parameters_per_unit(self) -> int:
        """Matrix parameters that go when one unit goes. Biases are cut as well but not counted as prunable."""
        return sum(s.unit * s.width for s in self.slices if s.scored)

    @property
    def is_attention(self) -> bool:
        return self.unit == KV_GROUP


@dataclass(frozen=True)
class Architecture:
    """The blocks of one concrete model, in the order in which it runs them.

    Attributes:
        parameters: all parameters, tied ones once, where the model itself was seen; None where only its configuration
            was, which need not tell whether a T5 has a head of its own.
    """

    family: Family
    config: PreTrainedConfig
    blocks: tuple[Block, ...]
    parameters: int | None = None

    @property
    def name(self) -> str:
        """Name of the family as the plan file spells it, e.g. ``llama``."""
        return self.family.name

    @property
    def prunable_parameters(self) -> int:
        return sum(block.size * block.parameters_per_unit for block in self.blocks)

    def pruned_config(self, kept: Mapping[str, tuple[int, ...]]) -> PreTrainedConfig:
        """The configuration of the model that keeps the units `kept` (block name -> sorted unit indices)."""
        return self.family.pruned_config(self.config, self.blocks, kept)


class Family:
    """What one model family must say about itself. A family is a small file with one instance of a subclass."""

    #: The stock `model_type`, which is also the name in the plan file.
    name: str
    #: Name of the stock class with a language-model head.
    model_class: str
    #: Family whose pruned checkpoints may be written under this one's `model_type`, because it can express them.
    stands_in_for: str = ""

    def blocks(self, config: PreTrainedConfig) -> tuple[Block, ...]:
        """All prunable blocks, from the configuration alone."""
        raise NotImplementedError

    def pruned_config(
        self, config: PreTrainedConfig, blocks: tuple[Block, ...], kept: Mapping[str, tuple[int, ...]]
    ) -> PreTrainedConfig:
        """The configuration after pruning: the stock class where it can express the result, else a pruned one."""
        raise NotImplementedError


def plain_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """`config` as keyword arguments for another configuration class, without what belongs to the old one."""
    settings = config.to_dict()
    stale = ("model_type", "architectures", "transformers_version", "_name_or_path", "auto_map", "pruned_format")
    for key in (*stale, "per_layer_config"):
        settings.pop(key, None)
    # A dequantised GGUF must not claim to be quantised: transformers would refuse to load what we write.
    settings.pop("quantization_config", None)
    return settings
