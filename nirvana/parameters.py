"""What a configuration says about the parameters of its model, without allocating them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel

from nirvana.checkpoint.tensors import TensorInfo
from nirvana.errors import NirvanaError


def auto_class(config: PreTrainedConfig) -> type:
    """The Auto class that opens models of this configuration with their language-model head."""
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def count_parameters(config: PreTrainedConfig, own_head: bool | None = None) -> int:
    """All parameters of the model that `config` describes, tied ones once.

    Args:
        own_head: whether the checkpoint holds a vocabulary head of its own although the class declares it tied, as T5
            v1.1 does; None takes what is usual for the configuration.
    """
    model = _on_meta(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    head = model.get_output_embeddings().weight
    if head is model.get_input_embeddings().weight:
        if own_head is None:
            # transformers 5 declares every T5 tied and unties v1.1, which does not scale its outputs, at loading.
            own_head = not getattr(config, "scale_decoder_outputs", True)
        count += head.numel() if own_head else 0
    return count


def parameter_names(config: PreTrainedConfig) -> frozenset[str]:
    """Names of all weights of the model that `config` describes; a tied one under each of its names."""
    return frozenset(_on_meta(config).state_dict())


def check_tensors(found: Mapping[str, TensorInfo], config: PreTrainedConfig) -> None:
    """Raise NirvanaError, naming the tensor, unless `found` holds every weight of the model in its shape.

    A weight that is declared tied may be missing.
    """
    model = _on_meta(config)
    for name, parameter in model.state_dict().items():
        if name not in found:
            if name in model.all_tied_weights_keys:
                continue
            raise NirvanaError(f"the checkpoint has no tensor {name}; get the whole checkpoint")
        if found[name].shape != tuple(parameter.shape):
            raise NirvanaError(
                f"{name} has shape {list(found[name].shape)} in the checkpoint, "
                f"its configuration says {list(parameter.shape)}"
            )


def _on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            return auto_class(config).from_config(config)
    except Exception as error:  # transformers raises almost anything for a configuration that makes no sense
        reason = " ".join(str(error).split()) or type(error).__name__
        raise NirvanaError(f"no model can be built from the configuration: {type(error).__name__}: {reason}") from None
