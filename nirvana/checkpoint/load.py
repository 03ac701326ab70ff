"""Open what nirvana wrote, or base weights through a plan."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from nirvana.checkpoint.tensors import CheckpointTensors
from nirvana.errors import NirvanaError
from nirvana.models import ModelSource, resolve, resolve_device, resolve_dtype
from nirvana.parameters import check_tensors
from nirvana.plan import PruningPlan
from nirvana.slicing import SlicedTensors, assemble


def load(
    folder: str | Path,
    *,
    plan: PruningPlan | str | Path | None = None,
    dtype: str = "auto",
    device: str = "auto",
) -> PreTrainedModel:
    """Open a checkpoint that nirvana wrote (or any model of a supported family), or prune one while it is read.

    Args:
        folder: checkpoint folder, Hub id, .gguf file or "demo".
        plan: a plan, or its file: `folder` then holds the base weights, of which only what the plan keeps is loaded.
            One dense tensor is in memory at a time and nothing is written. Kept weights are those of the base: what
            `nirvana.prune` repaired is in its checkpoint alone.
        dtype: "auto" (as stored), "float32", "bfloat16" or "float16".
        device: "auto" (CUDA where there is one) or a torch device.

    Returns:
        A transformers model in evaluation mode: it generates, trains and saves like any other.

    Raises:
        NirvanaError: not found, damaged, of an unknown family, or the plan does not fit (the message names the block).
    """
    source = resolve(folder)
    if plan is None:
        return source.model(dtype, device)
    return _load_pruned(source, plan if isinstance(plan, PruningPlan) else PruningPlan.load(plan), dtype, device)


def _load_pruned(source: ModelSource, plan: PruningPlan, dtype: str, device: str) -> PreTrainedModel:
    if source.gguf:
        raise NirvanaError(f"{source.name} cannot be read tensor by tensor; write it out once: nirvana apply")
    place, wanted = resolve_device(device), resolve_dtype(dtype)
    architecture = source.architecture()
    plan.check_fits(architecture)
    tensors = CheckpointTensors(source.folder())
    check_tensors(tensors.info(), architecture.config)
    sliced = SlicedTensors(tensors, architecture, plan, wanted)
    model = assemble(sliced, sliced.dtype, place)
    model.config._name_or_path = source.name
    if (defaults := source.generation_config()) is not None:
        model.generation_config = defaults
    return model
