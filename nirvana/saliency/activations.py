"""The activation walk: statistics of what linear layers read, in one forward pass, without keeping activations."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nirvana.architectures import Architecture, Block, Slice
from nirvana.architectures.inputs import ModelInputs, model_inputs
from nirvana.diagnosis import why_not_finite
from nirvana.errors import NirvanaError
from nirvana.ops.devices import tokens_per_pass
from nirvana.ops.precision import exact
from nirvana.patching import evaluation_mode, head_hands_on
from nirvana.saliency.finite import Finite
from nirvana.saliency.places import devices_of


class InputStatistics:
    """Mean and variance over tokens of each channel of one linear layer's input, float64 ``[channels]``.

    Batches are merged by mean and squared deviations (Chan, Golub, LeVeque 1979): however tokens are divided, the
    result is that of all of them at once, and a mean far from zero costs no digits.

    Attributes:
        tokens: how many tokens were seen; padding is not.
        mean: over tokens.
    """

    def __init__(self, channels: int, device: torch.device):
        self.tokens = 0
        self.mean = torch.zeros(channels, dtype=torch.float64, device=device)
        self._deviations = torch.zeros_like(self.mean)

    def add(self, x: Tensor) -> None:
        """`x` is ``[tokens, channels]``, any floating-point type."""
        if not len(x):
            return
        x = x.double()
        mean = x.mean(0)
        before, total = self.tokens, self.tokens + len(x)
        step = mean - self.mean
        self._deviations += (x - mean).square().sum(0) + step.square() * (before * len(x) / total)
        self.mean += step * (len(x) / total)
        self.tokens = total

    @property
    def mean_square(self) -> Tensor:
        """Mean over tokens of x^2."""
        return self._deviations / self.tokens + self.mean.square()

    @property
    def variance(self) -> Tensor:
        """Variance over tokens about the mean of all of them, unbiased."""
        return self._deviations / max(self.tokens - 1, 1)


def walk_activations(
    model: PreTrainedModel,
    architecture: Architecture,
    tokens: Tensor,
    attention_mask: Tensor | None,
    micro_batch: int | None,
    reads_inputs: bool,
    watch: Callable[[nn.Module, Callable[[], ModelInputs]], contextlib.AbstractContextManager] | None = None,
    progress: Callable[[], None] = lambda: None,
    *,
    finite: Finite | None = None,
) -> dict[str, InputStatistics]:
    """Run the dense model once over the batch and collect statistics of the inputs of its linear layers.

    Args:
        model: in any floating-point type; it is left as it was found.
        tokens: int64 ``[examples, tokens]``.
        attention_mask: ``[examples, tokens]`` or None; padding counts for nothing.
        micro_batch: examples per pass; None takes about as many tokens as the device likes (`tokens_per_pass`). The
            same up to rounding.
        reads_inputs: also at q, k, v, gate and up, not only at o and down.
        watch: called with the model and a function that tells the inputs of the pass at hand; what it returns is
            entered for the length of the walk.
        progress: called after each pass.
        finite: looks at what is computed; None raises at once.

    Returns:
        Weight name -> statistics. Weights that read the same tensor share one.

    Raises:
        NirvanaError: something is not finite, or all is padding.
    """
    statistics: dict[str, InputStatistics] = {}
    inputs: ModelInputs

    def collect(found: InputStatistics, encoder: bool) -> Callable:
        def hook(module: nn.Module, arguments: tuple) -> None:
            found.add(real_rows(arguments[0], inputs, encoder))

        return hook

    finite = Finite() if finite is None else finite
    tokens = tokens.cpu()  # what is padding is asked for each layer
    attention_mask = None if attention_mask is None else attention_mask.cpu()
    with contextlib.ExitStack() as stack:
        stack.enter_context(exact(devices_of(model)))
        stack.enter_context(torch.no_grad())
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(head_hands_on(model))  # no logits are needed
        for block in architecture.blocks:
            for parts, encoder in readers(model, block, reads_inputs):
                layer = model.get_submodule(_module(parts[0]))
                found = InputStatistics(layer.in_features, layer.weight.device)
                statistics |= {part.tensor: found for part in parts}
                stack.callback(layer.register_forward_pre_hook(collect(found, encoder)).remove)
        if watch is not None:
            stack.enter_context(watch(model, lambda: inputs))
        for inputs in passes(model, tokens, attention_mask, micro_batch):
            finite.check(model(**inputs.arguments).logits, lambda: why_not_finite(model))
            progress()
    if not all(found.tokens for found in statistics.values()):
        raise NirvanaError("the calibration batch holds nothing but padding; give examples with tokens")
    return statistics


def examples_per_pass(model: PreTrainedModel, tokens: Tensor, micro_batch: int | None) -> int:
    return micro_batch or max(1, tokens_per_pass(model.device) // tokens.shape[1])


def passes(
    model: PreTrainedModel, tokens: Tensor, attention_mask: Tensor | None, micro_batch: int | None
) -> Iterator[ModelInputs]:
    step = examples_per_pass(model, tokens, micro_batch)
    for start in range(0, len(tokens), step):
        mask = None if attention_mask is None else attention_mask[start : start + step]
        yield model_inputs(model, tokens[start : start + step], mask)


def real_rows(x: Tensor, inputs: ModelInputs, encoder: bool) -> Tensor:
    """``[examples, positions, channels]`` -> ``[tokens, channels]``: what is not padding, in the encoder or (also of a
    decoder alone) the decoder."""
    real = inputs.real(encoder)
    if real is None:
        return x.flatten(0, 1)
    rows = torch.cat([example * x.shape[1] + own for example, own in enumerate(real)])
    return x.flatten(0, 1)[rows.to(x.device)]


def in_encoder(model: PreTrainedModel, module: nn.Module) -> bool:
    return bool(model.config.is_encoder_decoder) and any(module is each for each in model.get_encoder().modules())


def matrices(block: Block) -> list[Slice]:
    """The block's scored matrices: those with rows of units first, the output layer last."""
    return sorted((part for part in block.slices if part.scored and part.width), key=lambda part: part.axis)


def _module(part: Slice) -> str:
    return part.tensor.removesuffix(".weight")


def readers(model: PreTrainedModel, block: Block, reads_inputs: bool) -> Iterator[tuple[list[Slice], bool]]:
    """Matrices that read one tensor, and whether its positions are the encoder's."""
    *rows, output = matrices(block)
    encoder = in_encoder(model, model.get_submodule(block.output))
    yield [output], encoder
    if reads_inputs and block.attention_kind == "cross":
        # Queries come from the decoder, keys and values from the encoder.
        yield rows[:1], False
        yield rows[1:], True
    elif reads_inputs:
        yield rows, encoder
