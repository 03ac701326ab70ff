"""A GGUF file written one tensor at a time: the header needs shapes and types only."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from gguf import GGUFWriter
from gguf.quants import quant_shape_to_byte_shape

from nirvana.export.gguf.tensors import Entry
from nirvana.export.gguf.types import GGMLQuantizationType, encode


def file_bytes(entry: Entry, kind: GGMLQuantizationType) -> int:
    """Bytes of a tensor in the file."""
    return math.prod(quant_shape_to_byte_shape(entry.shape, kind))


def write_file(
    path: Path,
    writer: GGUFWriter,
    tensors: Sequence[tuple[Entry, GGMLQuantizationType]],
    advance: Callable[[int], None],
) -> None:
    """Write the keys that `writer` holds, then the tensors.

    Args:
        path: the file.
        writer: with all keys added and no tensor.
        tensors: what is written and in which type.
        advance: called with the bytes of each tensor.
    """
    for entry, kind in tensors:
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), file_bytes(entry, kind), raw_dtype=kind)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry, kind in tensors:
            writer.write_tensor_data(encode(entry.name, entry.load(), kind))
            advance(file_bytes(entry, kind))
    finally:
        writer.close()
