"""Safetensors files written one tensor at a time.

`safetensors.torch.save_file` needs every tensor of a file in memory at once. The format does not: eight bytes with the
length of a JSON header, the header (name -> dtype, shape, byte range), then the tensors back to back. Shapes are known
before the weights are read, so the header can go first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from huggingface_hub.serialization import split_state_dict_into_shards_factory
from huggingface_hub.serialization._base import parse_size_to_int
from torch import Tensor

from nirvana.checkpoint.tensors import DTYPE_NAMES, INDEX, TensorInfo
from nirvana.errors import NirvanaError

#: What transformers uses as the size limit of one weight file.
SHARD_SIZE = "50GB"


def write_weights(
    folder: Path,
    tensors: Mapping[str, TensorInfo],
    load: Callable[[str], Tensor],
    shard_size: str | int = SHARD_SIZE,
    progress: Callable[[int], None] = lambda count: None,
) -> dict[str, str]:
    """Write `tensors` under the file names that transformers reads: one file, or numbered shards with an index.

    Args:
        folder: where the files go.
        tensors: name -> shape and type, in the order in which they are written.
        load: returns the tensor of a name; called once each.
        shard_size: largest file, in bytes or as transformers writes it ("5GB").
        progress: called with the number of bytes after each tensor.

    Returns:
        SHA-256 of each weight file, in hexadecimal.
    """
    split = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda info: info.nbytes,
        get_storage_id=lambda info: None,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes(shard_size),
    )
    sums = {}
    for file, names in split.filename_to_tensors.items():
        with open(folder / file, "wb") as stream:
            hashing = _Hashing(stream)
            _write_file(hashing, {name: tensors[name] for name in names}, load, progress)
            sums[file] = hashing.sha256.hexdigest()
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return sums


class _Hashing:
    """A file that is hashed while it is written, so that a checkpoint need not be read again for it."""

    def __init__(self, stream: BinaryIO):
        self._stream, self.sha256 = stream, hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        self._stream.write(data)
        self.sha256.update(data)


def shard_bytes(size: str | int) -> int:
    """Bytes of a size as transformers writes it ("5GB"), or of a number.

    Raises:
        NirvanaError: not a size, or below 1.
    """
    try:
        count = size if isinstance(size, int) else parse_size_to_int(size)
    except ValueError:
        count = 0
    if count < 1:
        raise NirvanaError(f"--max-shard-size {size!r} must be a size such as 5GB or 500MB")
    return count


def _write_file(
    stream: _Hashing,
    tensors: Mapping[str, TensorInfo],
    load: Callable[[str], Tensor],
    progress: Callable[[int], None],
) -> None:
    stream.write(header(tensors))
    for name, info in tensors.items():
        tensor = load(name).contiguous()
        if (tuple(tensor.shape), tensor.dtype) != (info.shape, info.dtype):
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, announced as {info}")
        stream.write(memoryview(tensor.cpu().reshape(-1).view(torch.uint8).numpy()))
        progress(info.nbytes)


def header(tensors: Mapping[str, TensorInfo]) -> bytes:
    """The first bytes of a safetensors file: length and JSON, padded with spaces so that the data is aligned to 8."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, info in tensors.items():
        entries[name] = {
            "dtype": DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [offset, offset + info.nbytes],
        }
        offset += info.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
