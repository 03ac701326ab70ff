"""Where weights come from: a folder of safetensors files, or a model in memory.

Both hand out one tensor at a time, so that slicing never holds a second copy of the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nirvana.errors import NirvanaError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

#: The names that the safetensors format gives to element types.
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Shape and element type of a tensor that has not been read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorSource(Protocol):
    """Named tensors, read one at a time."""

    def info(self) -> Mapping[str, TensorInfo]: ...

    def load(self, name: str) -> Tensor:
        """The tensor; the caller must not change it."""


class ModelTensors:
    """Parameters and persistent buffers of a model in memory, shared ones once."""

    def __init__(self, model: nn.Module):
        tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        state = model.state_dict()
        # A name that is declared tied is left out only where its memory really is shared: a T5 v1.1 checkpoint has a
        # head of its own although the class declares a tie.
        owner: dict[tuple[int, torch.Size], str] = {}
        for name in sorted(state, key=lambda name: name in tied):
            owner.setdefault((state[name].data_ptr(), state[name].shape), name)
        owners = set(owner.values())
        self._tensors = {name: tensor for name, tensor in state.items() if name in owners}

    def info(self) -> Mapping[str, TensorInfo]:
        return {name: TensorInfo(tuple(t.shape), t.dtype) for name, t in self._tensors.items()}

    def load(self, name: str) -> Tensor:
        return self._tensors[name]


class CheckpointTensors:
    """The tensors of a checkpoint folder, memory-mapped.

    Raises:
        NirvanaError: there is no safetensors file, or one is truncated or damaged; the message names the file.
    """

    def __init__(self, folder: str | Path):
        self._folder = Path(folder)
        self._where: dict[str, str] = {}
        self._info: dict[str, TensorInfo] = {}
        index = self._weight_map()
        for file in sorted(set(index.values())) or [SINGLE]:
            handle = self._open(file)
            for name in handle.keys():  # noqa: SIM118 (safe_open is no mapping)
                view = handle.get_slice(name)
                if view.get_dtype() not in DTYPES:
                    raise NirvanaError(
                        f"{self._folder / file}: {name} has type {view.get_dtype()}, dequantise it first"
                    )
                if name in self._where:
                    raise NirvanaError(f"{self._folder / file}: {name} stands in {self._where[name]} as well")
                self._where[name] = file
                self._info[name] = TensorInfo(tuple(view.get_shape()), DTYPES[view.get_dtype()])
        for name, file in index.items():
            if self._where.get(name) != file:
                raise NirvanaError(f"{self._folder / file} holds no {name}, which {INDEX} promises; get it again")

    def files(self) -> set[str]:
        """Names of the weight files."""
        return set(self._where.values())

    def _weight_map(self) -> dict[str, str]:
        """Tensor name -> file, as the index says; empty for a single file."""
        index = self._folder / INDEX
        if index.is_file():
            try:
                files = json.loads(index.read_text())["weight_map"]
                if not files or any(Path(file).name != file for file in files.values()):
                    raise ValueError("weight_map must map tensor names to files beside it")
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise NirvanaError(f"{index} is not a weight index: {error!r}") from None
            return files
        if (self._folder / SINGLE).is_file():
            return {}
        raise NirvanaError(f"{self._folder} holds no {SINGLE} and no {INDEX}; only safetensors weights are read")

    def _open(self, file: str) -> Any:
        if not (self._folder / file).is_file():
            raise NirvanaError(f"{self._folder / file} is missing, {INDEX} names it; get the whole checkpoint")
        try:
            return safe_open(self._folder / file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise NirvanaError(f"{self._folder / file} is truncated or damaged: {error}") from None

    def info(self) -> Mapping[str, TensorInfo]:
        return self._info

    def load(self, name: str) -> Tensor:
        # Opened anew each time: the pages of a mapping stay resident as long as it lives, so one for all tensors would
        # grow to the size of the file.
        return self._open(self._where[name]).get_tensor(name)
