"""How far each layer turns the residual stream, as CFSP (arXiv 2409.13199) and ShortGPT (arXiv 2403.03853) ask."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from nirvana.architectures.inputs import ModelInputs
from nirvana.saliency.activations import in_encoder, real_rows
from nirvana.saliency.places import on_host


def angle(cosine: Tensor) -> Tensor:
    """arccos / pi: from 0 (unchanged) to 1 (turned round)."""
    return cosine.acos() / torch.pi


class LayerAngles:
    """Collects, for each layer, the mean over tokens of a measure of the cosine between its input and its output.

    Read between a layer's own input and output: transformers' last hidden state lies behind the final norm, which would
    make the last layer look more important than it is.
    """

    def __init__(self, measure: Callable[[Tensor], Tensor] = angle):
        self._measure = measure
        self._sums: dict[str, Tensor] = {}
        self._tokens: dict[str, int] = {}

    @contextlib.contextmanager
    def watch(self, model: PreTrainedModel, inputs: Callable[[], ModelInputs]) -> Iterator[None]:
        """For `walk_activations`."""
        with contextlib.ExitStack() as stack:
            for name, module in model.named_modules():
                # A layer is what transformers would checkpoint.
                if isinstance(module, GradientCheckpointingLayer):
                    hook = functools.partial(self._collect, name, in_encoder(model, module), inputs)
                    stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            yield

    def mean(self) -> dict[str, float]:
        """Layer name -> mean over tokens, in the order in which the model runs its layers."""
        return {name: float(total) / self._tokens[name] for name, total in on_host(self._sums).items()}

    def _collect(
        self,
        name: str,
        encoder: bool,
        inputs: Callable[[], ModelInputs],
        module: nn.Module,
        arguments: tuple,
        keywords: dict,
        result: Tensor | tuple,
    ) -> None:
        before = arguments[0] if arguments else keywords["hidden_states"]
        after = result[0] if isinstance(result, tuple) else result
        before, after = (real_rows(x, inputs(), encoder).double() for x in (before, after.to(before.device)))
        cosine = F.cosine_similarity(before, after, dim=-1).clamp(-1, 1)
        self._sums[name] = self._sums.get(name, 0) + self._measure(cosine).sum()
        self._tokens[name] = self._tokens.get(name, 0) + len(cosine)


def layer_of(block: str, layers: list[str]) -> str:
    """The layer that a block belongs to: ``model.layers.0.mlp`` -> ``model.layers.0``."""
    return next(layer for layer in layers if block.startswith(f"{layer}."))
