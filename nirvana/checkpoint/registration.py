"""Makes the Auto classes of transformers open pruned checkpoints without `trust_remote_code`."""

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from nirvana.checkpoint import modeling_pruned_decoder as decoder
from nirvana.checkpoint import modeling_pruned_t5 as t5


def register_pruned_types() -> None:
    """Idempotent; `import nirvana` calls it.

    Only the names `pruned_*` are taken, so nothing changes for a stock `model_type`. Ours step aside where transformers
    brings such a name itself; where another copy of ours registered it (a reload, two copies on the path), they do not.
    """
    for config, backbone, causal in decoder.TYPES:
        _register(config, {AutoModel: backbone, AutoModelForCausalLM: causal})
    _register(
        t5.PrunedT5Config, {AutoModel: t5.PrunedT5Model, AutoModelForSeq2SeqLM: t5.PrunedT5ForConditionalGeneration}
    )


def _register(config: type[PreTrainedConfig], models: dict[type, type[PreTrainedModel]]) -> None:
    name = config.model_type
    if name in CONFIG_MAPPING and CONFIG_MAPPING[name].__module__.startswith("transformers."):
        return
    AutoConfig.register(name, config, exist_ok=True)
    for auto, model in models.items():
        auto.register(config, model, exist_ok=True)
