"""Checkpoint + plan -> smaller checkpoint, without gradients and without the model in memory."""

from __future__ import annotations

from pathlib import Path

from nirvana.architectures import describe
from nirvana.checkpoint.atomic import check_target
from nirvana.checkpoint.save import save_checkpoint
from nirvana.checkpoint.tensors import CheckpointTensors, ModelTensors
from nirvana.checkpoint.writer import SHARD_SIZE, shard_bytes
from nirvana.models import resolve, resolve_dtype
from nirvana.parameters import check_tensors
from nirvana.plan import PruningPlan
from nirvana.progress import Progress
from nirvana.slicing import SlicedTensors


def apply_checkpoint(
    source: str | Path,
    plan: PruningPlan,
    out: str | Path,
    *,
    dtype: str = "auto",
    overwrite: bool = False,
    shard_size: str | int = SHARD_SIZE,
    progress: Progress | None = None,
) -> Path:
    """The smaller checkpoint, from file to file with one tensor in memory at a time.

    Args:
        source: checkpoint folder with safetensors weights, Hub id, or "demo"; a .gguf is dequantised in memory first.
        plan: made for this model, or for one of the same shape.
        out: folder to make; `overwrite` replaces an older checkpoint there.
        dtype: "auto" keeps the stored types, else "float32", "bfloat16" or "float16".
        shard_size: largest weight file.
        progress: told the bytes written.

    Returns:
        Absolute path of the new folder, which appears whole or not at all.

    Raises:
        NirvanaError: the plan does not fit (the message names the block), weights are damaged, or `out` is refused.
    """
    check_target(out, overwrite, directory=True)
    shard_bytes(shard_size)
    model = resolve(source)
    model.refuse_as_target(out)
    architecture = describe(model.config())
    plan.check_fits(architecture)
    if model.gguf:
        tensors = ModelTensors(model.model(device="cpu"))
    else:
        tensors = CheckpointTensors(model.folder())
        check_tensors(tensors.info(), architecture.config)
    return save_checkpoint(
        out,
        SlicedTensors(tensors, architecture, plan, resolve_dtype(dtype)),
        plan,
        tokenizer=model.tokenizer(),
        generation_config=model.generation_config(),
        overwrite=overwrite,
        shard_size=shard_size,
        progress=progress,
    )
