"""Element types of GGUF tensors: which one a tensor takes, and its bytes.

The `gguf` package quantises to the types below. K-quants need llama.cpp's own `llama-quantize`.
"""

from __future__ import annotations

from collections.abc import Sequence

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType
from torch import Tensor

from nirvana.errors import NirvanaError

F32, F16, BF16, Q8_0 = (getattr(GGMLQuantizationType, name) for name in ("F32", "F16", "BF16", "Q8_0"))

#: --type -> type of the matrices, and the number by which llama.cpp names such a file.
TYPES: dict[str, tuple[GGMLQuantizationType, LlamaFileType]] = {
    "f32": (F32, LlamaFileType.ALL_F32),
    "f16": (F16, LlamaFileType.MOSTLY_F16),
    "bf16": (BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (Q8_0, LlamaFileType.MOSTLY_Q8_0),
    **{
        name.lower(): (GGMLQuantizationType[name], LlamaFileType[f"MOSTLY_{name}"])
        for name in ("Q5_1", "Q5_0", "Q4_1", "Q4_0")
    },
}

#: The largest number of float16, which is also the type of the scales of quantised blocks.
HALF_MAX = 65504.0


def check_type(name: str) -> str:
    """The key in TYPES.

    Raises:
        NirvanaError: not a type that can be written.
    """
    key = str(name).lower()
    if key in TYPES:
        return key
    if "_k" in key or key.startswith("iq"):
        raise NirvanaError(
            f"--type {name!r}: only llama.cpp itself quantises to it; export --type f16, then run "
            f"llama-quantize FILE.gguf OUT.gguf {name.upper()}"
        )
    raise NirvanaError(f"--type {name!r} must be one of {', '.join(TYPES)}")


def tensor_type(shape: Sequence[int], wanted: GGMLQuantizationType, is_output: bool) -> GGMLQuantizationType:
    """The type that a tensor takes.

    Vectors stay F32 (llama.cpp adds no others). The matrix that makes the logits keeps 8 bits, as in llama-quantize.
    Rows that do not divide into blocks stay F16, as in llama-quantize.
    """
    if len(shape) == 1:
        return F32
    if is_output and wanted not in (F32, F16, BF16):
        wanted = Q8_0
    block, _ = GGML_QUANT_SIZES[wanted]
    return F16 if shape[-1] % block else wanted


def encode(name: str, tensor: Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    """The values of a tensor in a type: float32, float16, or bytes ``[..., row bytes]``.

    Raises:
        NirvanaError: a value that is not finite, or too large for the type.
    """
    values = tensor.detach().to("cpu", torch.float32).contiguous()
    largest = values.abs().max().item() if values.numel() else 0.0
    if not largest < float("inf"):  # also true of NaN
        raise NirvanaError(f"tensor {name} holds NaN or infinity; repair the checkpoint")
    if kind not in (F32, BF16) and largest > HALF_MAX:
        raise NirvanaError(
            f"tensor {name} reaches {largest:.3g}, {kind.name} ends at {HALF_MAX:.0f}; use --type bf16 or f32"
        )
    return gguf.quants.quantize(values.numpy(), kind)
