"""ShortGPT (arXiv 2403.03853): drops whole layers, those that change the residual stream least.

The block influence of a layer is the mean over tokens of 1 - cos(its input, its output). The n lowest go at once,
without scoring again. Of the counts, the one whose attention and MLP matrices come nearest to the sparsity is taken; at
least one layer stays.

Left out: the last layer is read before the final norm, not behind it, which would inflate its influence.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nirvana.architectures import Architecture
from nirvana.architectures.decoder import DecoderFamily
from nirvana.architectures.inputs import ModelInputs
from nirvana.diagnosis import why_not_finite
from nirvana.errors import NirvanaError
from nirvana.patching import evaluation_mode, head_hands_on
from nirvana.references.base import PrunedReference, check_request
from nirvana.references.masks import independent
from nirvana.saliency.activations import passes
from nirvana.saliency.layers import LayerAngles

SCOPES = ("both",)


def prune(
    model: PreTrainedModel, tokens: Tensor, sparsity: float, *, seed: int = 0, scope: str = "both"
) -> PrunedReference:
    """See `nirvana.references.Reference`; decoders only, scope "both" only, nothing is random.

    The result is a model of the stock class with fewer layers.
    """
    architecture = check_request(model, tokens, sparsity, scope, SCOPES)
    if not isinstance(architecture.family, DecoderFamily) or model.config.model_type.startswith("pruned_"):
        raise NirvanaError(f"shortgpt drops layers of stock decoders only; this is a {model.config.model_type}")
    dropped = _choose(block_influence(model, tokens), architecture, sparsity)
    small = without_layers(model, dropped)
    prunable = architecture.prunable_parameters - sum(_sizes(architecture)[index] for index in dropped)
    gone = 1 - prunable / architecture.prunable_parameters
    total = len(model.get_decoder().layers)
    note = f"{len(dropped)} of {total} layers dropped, {gone:.1%} of the prunable parameters"
    return PrunedReference(small, sum(p.numel() for p in small.parameters()), prunable, note)


@torch.no_grad()
def block_influence(model: PreTrainedModel, tokens: Tensor) -> list[float]:
    """Mean over tokens of 1 - cos(input, output) of each layer, 0 (unchanged) to 2, in the order of the layers.

    Args:
        tokens: int64 ``[examples, tokens]``.

    Raises:
        NirvanaError: the model computes NaN or infinity.
    """
    influence = LayerAngles(lambda cosine: 1 - cosine)
    inputs: ModelInputs
    with evaluation_mode(model), head_hands_on(model), influence.watch(model, lambda: inputs):
        for inputs in passes(model, tokens, None, None):
            if not torch.isfinite(model(**inputs.arguments).logits).all():
                raise NirvanaError(why_not_finite(model))
    return list(influence.mean().values())


def without_layers(model: PreTrainedModel, dropped: list[int]) -> PreTrainedModel:
    """A copy of a stock decoder without these layers; what counts layers, in modules and configuration, is renewed."""
    small = independent(model)
    decoder, config = small.get_decoder(), small.config
    kept = [index for index in range(len(decoder.layers)) if index not in set(dropped)]
    decoder.layers = nn.ModuleList(decoder.layers[index] for index in kept)
    for index, layer in enumerate(decoder.layers):
        layer.self_attn.layer_idx = index  # the key of its cache
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[index] for index in kept]
    return small


def _choose(influence: list[float], architecture: Architecture, sparsity: float) -> list[int]:
    """The layers to drop: of the lowest first, as many as bring the removed parameters nearest to the sparsity."""
    sizes = _sizes(architecture)
    order = sorted(range(len(influence)), key=influence.__getitem__)[:-1]
    target = sparsity * architecture.prunable_parameters

    def distance(count: int) -> float:
        return abs(sum(sizes[index] for index in order[:count]) - target)

    return order[: min(range(len(order) + 1), key=distance)]


def _sizes(architecture: Architecture) -> list[int]:
    """Prunable parameters of each layer: an attention block and an MLP."""
    sizes = [block.size * block.parameters_per_unit for block in architecture.blocks]
    return [attention + mlp for attention, mlp in zip(sizes[::2], sizes[1::2], strict=True)]
