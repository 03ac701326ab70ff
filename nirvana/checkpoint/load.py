"""Open what nirvana wrote."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from nirvana.models import resolve


def load(folder: str | Path, *, dtype: str = "auto", device: str = "auto") -> PreTrainedModel:
    """Open a checkpoint that nirvana wrote (or any model of a supported family).

    Args:
        folder: checkpoint folder, Hub id, .gguf file or "demo".
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        device: "auto" (CUDA where there is one) or a torch device.

    Returns:
        A transformers model in evaluation mode: it generates, trains and saves like any other.

    Raises:
        NirvanaError: not found, damaged, or of an unknown family.
    """
    return resolve(folder).model(dtype, device)
