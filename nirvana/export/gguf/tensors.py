"""The tensors of a model under llama.cpp's names and in its order of rows, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import gguf
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from nirvana.architectures.decoder import head_dimension
from nirvana.checkpoint.tensors import TensorSource
from nirvana.errors import NirvanaError
from nirvana.export.gguf.architecture import EMBEDDINGS, HEAD, Layout, Widths
from nirvana.export.gguf.rope import Rope
from nirvana.parameters import parameter_names

_NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Entry:
    """One tensor of the file.

    Attributes:
        name: llama.cpp's name.
        shape: rows first, as torch has it.
        load: reads and arranges it.
        is_output: it makes the logits.
    """

    name: str
    shape: tuple[int, ...]
    load: Callable[[], Tensor]
    is_output: bool = False


def entries(source: TensorSource, config: PreTrainedConfig, layout: Layout, rope: Rope, tied: bool) -> list[Entry]:
    """Every tensor that llama.cpp wants for this model, in file order.

    Raises:
        NirvanaError: a weight that is no floating-point number, or a bias that the architecture does not read.
    """
    return list(_Arrangement(source, config, layout, tied).walk(rope))


class _Arrangement:
    def __init__(self, source: TensorSource, config: PreTrainedConfig, layout: Layout, tied: bool):
        self.source, self.config, self.layout, self.tied = source, config, layout, tied
        # A file may hold more than the model has (old rotary buffers, biases that the configuration turns off).
        known = parameter_names(config)
        self.info = {name: info for name, info in source.info().items() if name in known}
        for name, info in self.info.items():
            if not info.dtype.is_floating_point:
                raise NirvanaError(f"tensor {name} is {info.dtype}; export the unquantised checkpoint")
        self.widths = Widths.of(config)
        architecture = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[layout.name]
        self.names = gguf.get_tensor_name_map(architecture, len(self.widths.heads))

    def walk(self, rope: Rope) -> Iterator[Entry]:
        # A tied matrix may stand under either name.
        embeddings = EMBEDDINGS if EMBEDDINGS in self.info else HEAD
        yield Entry("token_embd.weight", self.info[embeddings].shape, lambda: self.source.load(embeddings), self.tied)
        if rope.divisors is not None:
            yield Entry("rope_freqs.weight", tuple(rope.divisors.shape), lambda: rope.divisors)
        for index in range(len(self.widths.heads)):
            yield from self._layer(index)
        yield self._plain("model.norm.weight")
        if not self.tied:
            yield Entry("output.weight", self.info[HEAD].shape, lambda: self.source.load(HEAD), True)

    def _layer(self, index: int) -> Iterator[Entry]:
        prefix = f"model.layers.{index}"
        if self.layout.fused:
            yield self._fused(index)
        for part in _LINEAR:
            module = f"{prefix}.{'mlp' if part in ('gate_proj', 'up_proj', 'down_proj') else 'self_attn'}.{part}"
            if self.layout.fused and part in ("q_proj", "k_proj", "v_proj"):
                continue
            heads = {"q_proj": self.widths.heads[index], "k_proj": self.widths.groups[index]}.get(part)
            for name in (f"{module}.weight", f"{module}.bias"):
                if name in self.info:
                    yield self._rotated(name, heads) if heads and self.layout.interleaved else self._plain(name)
        for part in _NORMS:
            if f"{prefix}.{part}.weight" in self.info:
                yield self._plain(f"{prefix}.{part}.weight")

    def _plain(self, name: str) -> Entry:
        return Entry(self._target(name), self.info[name].shape, lambda: self.source.load(name))

    def _rotated(self, name: str, heads: int) -> Entry:
        return Entry(self._target(name), self.info[name].shape, lambda: interleave(self.source.load(name), heads))

    def _fused(self, index: int) -> Entry:
        names = [f"model.layers.{index}.self_attn.{part}.weight" for part in ("q_proj", "k_proj", "v_proj")]
        rows = (self.widths.heads[index] + 2 * self.widths.groups[index]) * head_dimension(self.config)
        shape = (rows, self.config.hidden_size)
        return Entry(
            f"blk.{index}.attn_qkv.weight", shape, lambda: torch.cat([self.source.load(name) for name in names])
        )

    def _target(self, name: str) -> str:
        if name.endswith(".bias") and name.split(".")[-2] not in self.layout.biases:
            raise NirvanaError(f"llama.cpp's {self.layout.name} reads no bias, the model has {name}; use --format onnx")
        target = self.names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise NirvanaError(f"llama.cpp's {self.layout.name} has no place for tensor {name}; use --format onnx")
        return target


def interleave(tensor: Tensor, heads: int) -> Tensor:
    """Rows of a q or k projection (or entries of its bias) so that channels i and i + head_dim / 2 become neighbours.

    Args:
        tensor: ``[heads * head_dim, ...]``; `heads` are this layer's query heads for q, its key/value heads for k.
    """
    half = tensor.shape[0] // heads // 2
    return tensor.reshape(heads, 2, half, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
