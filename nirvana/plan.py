"""The pruning plan: which units of which block stay. The one artifact between deciding and cutting.

README of the format (``plan.json``, and ``nirvana_plan.json`` in every checkpoint)::

    {"format": "nirvana-plan", "version": 1, "architecture": "llama",
     "base": {"name": ..., "config_sha256": ...},
     "settings": {everything that led to the plan},
     "totals": {"prunable_before", "prunable_after", "parameters_before", "parameters_after"},
     "blocks": [{"name": ..., "unit": "kv_group" | "neuron", "size": units before, "kept": [sorted indices]}]}
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from nirvana.architectures import KV_GROUP, NEURON, Architecture
from nirvana.checkpoint.atomic import write_file
from nirvana.errors import NirvanaError

FORMAT, VERSION = "nirvana-plan", 1

#: The plan inside a checkpoint folder.
PLAN_FILE = "nirvana_plan.json"


@dataclass(frozen=True)
class BlockPlan:
    """The kept units of one block: `kept` is sorted, unique, not empty and within ``range(size)``."""

    name: str
    unit: str
    size: int
    kept: tuple[int, ...]


@dataclass(frozen=True)
class PruningPlan:
    architecture: str
    base: dict[str, Any]
    settings: dict[str, Any]
    totals: dict[str, int]
    blocks: tuple[BlockPlan, ...] = field(repr=False)

    @property
    def kept(self) -> dict[str, tuple[int, ...]]:
        """Block name -> sorted indices of the kept units."""
        return {block.name: block.kept for block in self.blocks}

    @property
    def sparsity(self) -> float:
        """Removed fraction of the prunable (attention + MLP matrix) parameters."""
        return 1 - self.totals["prunable_after"] / self.totals["prunable_before"]

    def check_fits(self, architecture: Architecture) -> None:
        """Raise NirvanaError, naming the block, unless the plan was made for a model of this shape."""
        if self.architecture != architecture.name:
            raise NirvanaError(f"the plan is for family {self.architecture!r}, the model is {architecture.name!r}")
        model = {block.name: block for block in architecture.blocks}
        for block in self.blocks:
            mine = model.pop(block.name, None)
            if mine is None:
                raise NirvanaError(f"the plan's block {block.name} does not exist in the model")
            if (mine.unit, mine.size) != (block.unit, block.size):
                raise NirvanaError(
                    f"block {block.name}: the plan was made for {block.size} units of kind {block.unit}, "
                    f"the model has {mine.size} of kind {mine.unit}; make a plan for this model"
                )
        if model:
            raise NirvanaError(f"the plan says nothing about block {next(iter(model))} of the model")
        if self.totals["prunable_before"] != architecture.prunable_parameters:
            raise NirvanaError(
                f"the plan was made for blocks of other shapes: {self.blocks[0].name} and the others have "
                f"{self.totals['prunable_before']:,} prunable parameters in the plan, "
                f"{architecture.prunable_parameters:,} in the model"
            )

    def to_json(self) -> str:
        """The plan as text: one block a line, the same bytes for the same plan."""
        head = {
            "format": FORMAT,
            "version": VERSION,
            "architecture": self.architecture,
            "base": self.base,
            "settings": self.settings,
            "totals": self.totals,
        }
        lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
        blocks = [json.dumps({**block.__dict__, "kept": list(block.kept)}) for block in self.blocks]
        return "{" + ",\n ".join([*lines, '"blocks": [\n  ' + ",\n  ".join(blocks) + "]"]) + "}\n"

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the plan. The file appears whole or not at all.

        Raises:
            NirvanaError: the file exists and `overwrite` is false, or it cannot be written.
        """
        write_file(path, self.to_json().encode(), overwrite=overwrite)

    @classmethod
    def load(cls, path: str | Path) -> PruningPlan:
        """Read ``plan.json``, or the plan inside a checkpoint directory written by nirvana.

        Raises:
            NirvanaError: no such file, not a plan, or a plan that contradicts itself; the message names the block.
        """
        path = Path(path)
        if path.is_dir():
            path /= PLAN_FILE
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise NirvanaError(f"no plan at {path}") from None
        except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, endless numbers
            raise NirvanaError(f"{path} is not a readable JSON plan: {error}") from None
        try:
            return cls.from_dict(data)
        except NirvanaError as error:
            raise NirvanaError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, data: Any) -> PruningPlan:
        """Build a plan from its JSON form, checking everything that can be checked without the model."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise NirvanaError(f'this is not a pruning plan: "format" must be "{FORMAT}"')
        if data.get("version") != VERSION:
            raise NirvanaError(f"plan version {data.get('version')!r} is not supported; this release reads {VERSION}")
        kinds = {"architecture": str, "base": dict, "settings": dict, "totals": dict, "blocks": list}
        for key, kind in kinds.items():
            if not isinstance(data.get(key), kind):
                raise NirvanaError(f'the plan\'s "{key}" must be a JSON {kind.__name__}')
        for key in ("prunable_before", "prunable_after", "parameters_before", "parameters_after"):
            if not _is_count(data["totals"].get(key)):
                raise NirvanaError(f'the plan\'s totals must hold the whole number "{key}"')
        if not data["totals"]["prunable_before"]:
            raise NirvanaError('the plan\'s totals say "prunable_before" is 0')
        if not data["blocks"]:
            raise NirvanaError("the plan has no blocks")
        blocks = tuple(_read_block(entry) for entry in data["blocks"])
        names = [block.name for block in blocks]
        for name in names:
            if names.count(name) > 1:
                raise NirvanaError(f"block {name} stands more than once in the plan")
        return cls(data["architecture"], data["base"], data["settings"], data["totals"], blocks)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _read_block(entry: Any) -> BlockPlan:
    name = entry.get("name") if isinstance(entry, dict) else None
    if not isinstance(name, str):
        raise NirvanaError(f"a block of the plan has no name: {str(entry)[:80]}")
    unit, size, kept = entry.get("unit"), entry.get("size"), entry.get("kept")
    if unit not in (KV_GROUP, NEURON):
        raise NirvanaError(f"block {name}: unit must be {KV_GROUP!r} or {NEURON!r}, not {unit!r}")
    if not _is_count(size) or not isinstance(kept, list) or not all(map(_is_count, kept)):
        raise NirvanaError(f"block {name}: size must be a whole number and kept a list of unit indices")
    if not kept:
        raise NirvanaError(f"block {name}: kept is empty; at least one unit must stay")
    if any(a >= b for a, b in pairwise(kept)):
        raise NirvanaError(f"block {name}: kept must be sorted without doubles")
    if kept[-1] >= size:
        raise NirvanaError(f"block {name}: unit {kept[-1]} is out of range, the block has {size}")
    return BlockPlan(name, unit, size, tuple(kept))


def config_fingerprint(config: PreTrainedConfig) -> str:
    """SHA-256 of what the configuration says about the model, without paths, versions and types."""
    volatile = {
        "transformers_version",
        "_name_or_path",
        "dtype",
        "torch_dtype",
        "architectures",
        "quantization_config",
        "auto_map",
        "pruned_format",
    }
    facts = {key: value for key, value in config.to_dict().items() if key not in volatile}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
