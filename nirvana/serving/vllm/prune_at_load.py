"""Serve base weights + a plan: vLLM reads the dense checkpoint, and keeps what the plan keeps.

    vllm serve BASE --config-format nirvana --hf-overrides '{"nirvana_plan": "plan.json"}'

Without an override the plan is ``nirvana_plan.json`` beside the weights. Nothing is written, and no more than one dense
tensor is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedConfig
from vllm.transformers_utils.config import HFConfigParser
from vllm.transformers_utils.config_parser_base import ConfigParserBase

from nirvana.architectures import describe
from nirvana.errors import NirvanaError
from nirvana.plan import PLAN_FILE, PruningPlan
from nirvana.serving.vllm.plugin import ARCHITECTURES
from nirvana.slicing import cuts

#: The value of --config-format, and the key in --hf-overrides that names the plan.
CONFIG_FORMAT, OVERRIDE = "nirvana", "nirvana_plan"

#: Where the smaller model's configuration keeps the plan's absolute path, for the processes that load weights.
ATTRIBUTE = "prune_at_load"


class PruneAtLoadParser(ConfigParserBase):
    """``--config-format nirvana``: the configuration of the model that the plan leaves."""

    def parse(
        self, model: str | Path, trust_remote_code: bool, revision: str | None = None, **kwargs
    ) -> tuple[dict, PreTrainedConfig]:
        overrides = kwargs.get("hf_overrides")
        wish = overrides.get(OVERRIDE) if isinstance(overrides, dict) else None
        found, dense = HFConfigParser().parse(model, trust_remote_code, revision, **kwargs)
        if "quantization_config" in found:
            raise NirvanaError(f"{model} is quantised; prune the unquantised checkpoint, then quantise")
        path = Path(wish or Path(model) / PLAN_FILE).absolute()
        if not wish and not path.is_file():
            raise NirvanaError(f'no plan at {path}; name one: --hf-overrides \'{{"{OVERRIDE}": "plan.json"}}\'')
        plan, architecture = PruningPlan.load(path), describe(dense)
        plan.check_fits(architecture)
        config = architecture.pruned_config(plan.kept)
        # Of the base's family even where equal widths make a stock configuration: a stock class would not slice.
        config.architectures = [f"Pruned{architecture.family.model_class}"]
        if config.architectures[0] not in ARCHITECTURES:
            raise NirvanaError(f"family {architecture.name!r} cannot be pruned while vLLM loads it; use nirvana apply")
        config.dtype = dense.dtype
        setattr(config, ATTRIBUTE, str(path))
        return config.to_dict(), config


def slice_weights(weights: Iterable[tuple[str, Tensor]], config: PreTrainedConfig) -> Iterator[tuple[str, Tensor]]:
    """The dense tensors cut to what `config` keeps; as they are where it was not made by `PruneAtLoadParser`."""
    path = getattr(config, ATTRIBUTE, None)
    planned = cuts(describe(config), PruningPlan.load(path), config) if path else {}
    for name, tensor in weights:
        yield name, planned[name].of(tensor) if name in planned else tensor
