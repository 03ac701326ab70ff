"""What vLLM calls at the start of each of its processes: which model types there are and which classes run them."""

from __future__ import annotations

import functools

#: Registered as strings: vLLM imports the classes when it builds such a model.
ARCHITECTURES = tuple(f"Pruned{family}ForCausalLM" for family in ("Llama", "Mistral", "Qwen2", "Qwen3"))


@functools.cache  # vLLM may call it more than once in a process, and warns of whatever is registered twice
def register() -> None:
    """Entry point of the group ``vllm.general_plugins``.

    Importing nirvana has already registered the configuration types with transformers; it costs 0.15 s in a process
    that has vLLM loaded.
    """
    from vllm import ModelRegistry
    from vllm.transformers_utils.config import register_config_parser

    from nirvana.serving.vllm.prune_at_load import CONFIG_FORMAT, PruneAtLoadParser

    for name in ARCHITECTURES:
        ModelRegistry.register_model(name, f"nirvana.serving.vllm.models:{name}")
    register_config_parser(CONFIG_FORMAT)(PruneAtLoadParser)
