"""SliceGPT (arXiv 2401.15024): a narrower residual stream, by principal components, in memory only.

RMSNorm's scales go into the matrices behind it; then the stream may be rotated between any two blocks. Behind the
embedding, each attention and each MLP it is rotated to the eigenvectors Q of H = sum over tokens of x x^T (fp64), and
the D' with the largest eigenvalues stay. Matrices that read the stream become W Q, those that write to it Q^T W, and
the residual goes from one basis to the next by a matrix Q_before^T Q_after, which costs parameters and time. From the
first layer to the last, each H is that of the sliced model so far, as published.

D' is the multiple of 8 with which the whole model, shortcut matrices included, comes nearest to the parameters that
remain when `sparsity` of the prunable ones go. The paper's "25 %" is of D itself.

As published, the last MLP writes all D channels; they are left unrotated, and final norm and head as they were. Where
the embedding is tied to the head it stays whole as well, and a D x D' matrix follows it: a sliced copy would cost more.
Left out, because they change no output but for rounding: the published damping of H (1 % of its mean diagonal added to
the diagonal moves no eigenvector), and its random rotation of the kept components.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nirvana.architectures.inputs import model_inputs
from nirvana.diagnosis import why_not_finite
from nirvana.errors import NirvanaError
from nirvana.patching import evaluation_mode, forward_replaced, head_hands_on
from nirvana.references.base import PrunedReference, check_request
from nirvana.references.masks import independent
from nirvana.references.moments import SecondMoments
from nirvana.references.sliced_layer import SlicedLayer, linear, set_weight

SCOPES = ("both",)
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
STEP = 8


def prune(
    model: PreTrainedModel, tokens: Tensor, sparsity: float, *, seed: int = 0, scope: str = "both"
) -> PrunedReference:
    """See `nirvana.references.Reference`; decoders only, scope "both" only, nothing is random.

    The result runs like the original, with a cache too; it cannot be saved, and its configuration is the dense one's.
    Its ``prunable_after`` counts the shortcut matrices.
    """
    architecture = check_request(model, tokens, sparsity, scope, SCOPES)
    if architecture.family.name not in FAMILIES:
        raise NirvanaError(f"slicegpt is for {', '.join(FAMILIES)} only; this is a {model.config.model_type}")
    hidden = model.config.hidden_size
    target = architecture.parameters - sparsity * architecture.prunable_parameters
    width = min(range(STEP, hidden + 1, STEP), key=lambda width: abs(parameters_at(model, width) - target))
    small = sliced(model, tokens, width)
    matrices = sum(p.numel() for p in small.get_decoder().layers.parameters() if p.dim() == 2)
    total = sum(p.numel() for p in small.parameters())
    return PrunedReference(small, total, matrices, f"in memory only: {width} of {hidden} residual channels")


def parameters_at(model: PreTrainedModel, width: int) -> int:
    """All parameters of the model that `sliced` makes."""
    hidden = model.config.hidden_size
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embedding
    layers = model.get_decoder().layers
    total = sum(p.numel() for p in model.parameters())
    total += hidden * width if tied else len(embedding) * (width - hidden)
    for layer in layers:
        end = hidden if layer is layers[-1] else width
        for module in _reading(layer.self_attn) + _reading(layer.mlp):
            total += module.out_features * (width - hidden)
        for module, after in ((layer.self_attn.o_proj, width), (layer.mlp.down_proj, end)):
            total += (module.in_features + (module.bias is not None)) * (after - hidden)
        total += width * width + width * end - 2 * hidden  # shortcuts; two norms are gone
    return total


@torch.no_grad()
def sliced(model: PreTrainedModel, tokens: Tensor, width: int) -> PreTrainedModel:
    """A copy of `model` with `width` channels in its residual stream.

    Args:
        tokens: int64 ``[examples, tokens]``; the activations of one layer on all of it are in memory.

    Raises:
        NirvanaError: the model computes NaN or infinity.
    """
    small = independent(model)
    decoder, embedding = small.get_decoder(), small.get_input_embeddings()
    slicer = _Slicer(small, width)
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluation_mode(small))
        stack.enter_context(head_hands_on(small))  # no logits are needed
        for layer in decoder.layers:
            stack.enter_context(forward_replaced(layer, functools.partial(functools.partial, slicer.run, layer)))
        small(**model_inputs(small, tokens).arguments)
    decoder.layers = nn.ModuleList(slicer.layers)
    if small.get_output_embeddings().weight is embedding.weight:
        decoder.layers[0].entry = linear(slicer.first.T, embedding)
    else:
        narrow = embedding.weight.double() @ slicer.first
        embedding.weight = nn.Parameter(narrow.to(embedding.weight.dtype))
        embedding.embedding_dim = width
    return small


class _Slicer:
    """Makes the layers one after the other, while the model runs.

    Attributes:
        layers: made so far.
        first: basis behind the embedding, float64 ``[hidden, width]``.
    """

    def __init__(self, model: PreTrainedModel, width: int):
        self._model, self._width = model, width
        self._depth = len(model.get_decoder().layers)
        self._basis: Tensor
        self.layers: list[SlicedLayer] = []
        self.first: Tensor

    def run(self, layer: nn.Module, forward: Callable, x: Tensor, **keywords: Any) -> Tensor:
        """Stands in for the forward of a dense layer, on the sliced stream; the first layer slices it."""
        if not self.layers:
            self.first = self._basis = self._principal(x)
            x = x @ self._basis.to(x.dtype)
        norm = layer.input_layernorm
        made = SlicedLayer(layer.self_attn, layer.mlp, len(self._basis), norm.variance_epsilon)
        for module in _reading(layer.self_attn):
            _read(module, norm.weight, self._basis)
        x, made.attention_shortcut = self._onward(
            x, made.attended(x, **keywords), layer.self_attn.o_proj, self._principal
        )
        for module in _reading(layer.mlp):
            _read(module, layer.post_attention_layernorm.weight, self._basis)
        last = len(self.layers) == self._depth - 1
        x, made.mlp_shortcut = self._onward(
            x, made.mapped(x), layer.mlp.down_proj, self._whole if last else self._principal
        )
        self.layers.append(made)
        return x

    def _onward(
        self, x: Tensor, change: Tensor, output: nn.Linear, choose: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, nn.Linear]:
        """The stream in its next basis, and the matrix that takes it there; `output`, which wrote `change`, follows."""
        before = self._basis
        dense = x @ before.T.to(x.dtype) + change
        self._basis = after = choose(dense)
        set_weight(output, after.T @ output.weight.double(), output.weight)
        if output.bias is not None:
            output.bias = nn.Parameter((output.bias.double() @ after).to(output.bias.dtype))
        return dense @ after.to(x.dtype), linear(after.T @ before, output)

    def _principal(self, x: Tensor) -> Tensor:
        moments = SecondMoments(x.shape[-1], x.device)
        moments.add(x.flatten(0, -2))
        if not torch.isfinite(moments.sum).all():
            raise NirvanaError(why_not_finite(self._model))
        return torch.linalg.eigh(moments.sum).eigenvectors.flip(1)[:, : self._width]

    def _whole(self, x: Tensor) -> Tensor:
        return torch.eye(x.shape[-1], dtype=torch.float64, device=x.device)


def _reading(block: nn.Module) -> list[nn.Linear]:
    """The matrices of an attention or an MLP that read the stream."""
    names = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    return [module for name, module in block.named_children() if name in names]


def _read(module: nn.Linear, scale: Tensor, basis: Tensor) -> None:
    set_weight(module, module.weight.double() * scale.double() @ basis, module.weight)
