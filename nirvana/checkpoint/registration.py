"""Makes the Auto classes of transformers open pruned checkpoints without `trust_remote_code`."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from nirvana.checkpoint import pruned_decoder as decoder
from nirvana.checkpoint import pruned_t5 as t5


def register_pruned_types() -> None:
    """Idempotent; `import nirvana` calls it.

    `exist_ok` lets ours step aside silently for nobody: the names `pruned_*` are ours, and registering them twice in
    one process (a reload, two copies on the path) must not fail.
    """
    for config, backbone, causal in (
        (decoder.PrunedLlamaConfig, decoder.PrunedLlamaModel, decoder.PrunedLlamaForCausalLM),
        (decoder.PrunedMistralConfig, decoder.PrunedMistralModel, decoder.PrunedMistralForCausalLM),
        (decoder.PrunedQwen2Config, decoder.PrunedQwen2Model, decoder.PrunedQwen2ForCausalLM),
        (decoder.PrunedQwen3Config, decoder.PrunedQwen3Model, decoder.PrunedQwen3ForCausalLM),
    ):
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, backbone, exist_ok=True)
        AutoModelForCausalLM.register(config, causal, exist_ok=True)
    AutoConfig.register(t5.PrunedT5Config.model_type, t5.PrunedT5Config, exist_ok=True)
    AutoModel.register(t5.PrunedT5Config, t5.PrunedT5Model, exist_ok=True)
    AutoModelForSeq2SeqLM.register(t5.PrunedT5Config, t5.PrunedT5ForConditionalGeneration, exist_ok=True)
