"""What is wrong with a checkpoint folder, in one line, before any model is built. `load` and `check` ask the same."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from transformers import CONFIG_MAPPING, PreTrainedConfig

from nirvana.architectures import FAMILIES, Architecture, describe
from nirvana.checkpoint import modeling_pruned_decoder
from nirvana.checkpoint.tensors import CheckpointTensors
from nirvana.errors import NirvanaError
from nirvana.parameters import check_tensors
from nirvana.plan import PLAN_FILE, PruningPlan


@dataclass(frozen=True)
class Verified:
    """A folder whose parts agree.

    Attributes:
        tensors: what the headers of its weight files say.
        plan: its plan, or None.
        applied: whether the weights are those after the plan; False where a plan lies beside the weights it is for.
    """

    tensors: CheckpointTensors
    plan: PruningPlan | None
    applied: bool


def check_config_file(folder: Path) -> None:
    """Raise NirvanaError, naming the file, unless ``config.json`` says something that this release reads."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON
        raise NirvanaError(f"{file} is not readable JSON: {error}") from None
    if not isinstance(config, dict):
        raise NirvanaError(f"{file} must hold a JSON object")
    name = config.get("model_type")
    if name not in CONFIG_MAPPING and "auto_map" not in config:
        known = ", ".join(sorted(FAMILIES))
        raise NirvanaError(f"{file} has the unknown model_type {name!r}; known are {known} (and pruned_...)")
    version, mine = config.get("pruned_format", 1), modeling_pruned_decoder.FORMAT
    if version != mine:
        raise NirvanaError(f"{file} has pruned_format {version!r}, this release reads {mine}; upgrade nirvana")


def verify(folder: str | Path, config: PreTrainedConfig) -> Verified:
    """Compare configuration, headers of the weight files and plan; no weight is read.

    Args:
        folder: checkpoint folder with safetensors weights.
        config: what its ``config.json`` says.

    Raises:
        NirvanaError: a weight file is missing or damaged, a tensor is missing or of another shape than the
            configuration says, or the plan is of another model.
    """
    folder = Path(folder)
    tensors = CheckpointTensors(folder)
    try:
        check_tensors(tensors.info(), config)
    except NirvanaError as error:
        raise NirvanaError(f"{folder}: {error}") from None
    if not (folder / PLAN_FILE).is_file():
        return Verified(tensors, None, False)
    plan = PruningPlan.load(folder)
    return Verified(tensors, plan, _is_applied(plan, describe(config), folder / PLAN_FILE))


def _is_applied(plan: PruningPlan, model: Architecture, file: Path) -> bool:
    """Whether the model has the widths after the plan (True) or those before it (False).

    Raises:
        NirvanaError: neither; the message names the block.
    """

    def disagrees(why: str) -> NirvanaError:
        return NirvanaError(f"{file} disagrees with config.json: {why}; delete it or write the checkpoint again")

    if plan.architecture not in (model.name, model.family.stands_in_for):
        raise disagrees(f"the plan is for family {plan.architecture!r}, the model is {model.name!r}")
    planned = {block.name: block for block in plan.blocks}
    sizes = {block.name: block.size for block in model.blocks}
    for name in [*planned, *sizes]:
        if name not in planned or name not in sizes:
            raise disagrees(f"block {name} stands only in the {'plan' if name in planned else 'model'}")
    different = [name for name, size in sizes.items() if size != len(planned[name].kept)]
    if different and all(size == planned[name].size for name, size in sizes.items()):
        return False
    if different:
        block = planned[different[0]]
        raise disagrees(
            f"block {block.name}: the plan keeps {len(block.kept)} of {block.size}, the model has {sizes[block.name]}"
        )
    if plan.totals["prunable_after"] != model.prunable_parameters:
        raise disagrees(
            f"the plan leaves {plan.totals['prunable_after']:,} prunable parameters, "
            f"the model has {model.prunable_parameters:,}"
        )
    return True
