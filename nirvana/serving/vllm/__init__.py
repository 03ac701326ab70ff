"""vLLM: a plugin that vLLM finds by itself (entry point group ``vllm.general_plugins``)."""
