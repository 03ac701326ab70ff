"""A decoder layer on a narrower residual stream: what SliceGPT (arXiv 2401.15024) makes of one."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SlicedLayer(nn.Module):
    """x -> x S_1 + attention(norm(x)) =: y, then y S_2 + mlp(norm(y)).

    The attention and the MLP are the family's own modules with narrower matrices. The norm has no scale, and divides by
    the root of sum x^2 / hidden, so that rotating the stream changes nothing.

    Args:
        attention: called with ``hidden_states`` and what the model hands to its layers; returns a tuple.
        mlp: called with ``[..., width]``.
        hidden: width of the dense residual stream.
        epsilon: of the family's norm.

    Attributes:
        entry: applied first; None but for a first layer that reads the dense embeddings.
        attention_shortcut, mlp_shortcut: S_1 and S_2.
    """

    def __init__(self, attention: nn.Module, mlp: nn.Module, hidden: int, epsilon: float):
        super().__init__()
        self.entry: nn.Linear | None = None
        self.self_attn, self.mlp = attention, mlp
        self.attention_shortcut: nn.Linear
        self.mlp_shortcut: nn.Linear
        self._hidden, self._epsilon = hidden, epsilon

    def forward(self, hidden_states: Tensor, **keywords) -> Tensor:
        x = hidden_states if self.entry is None else self.entry(hidden_states)
        x = self.attention_shortcut(x) + self.attended(x, **keywords)
        return self.mlp_shortcut(x) + self.mapped(x)

    def attended(self, x: Tensor, **keywords) -> Tensor:
        return self.self_attn(hidden_states=self._normalised(x), **keywords)[0]

    def mapped(self, x: Tensor) -> Tensor:
        return self.mlp(self._normalised(x))

    def _normalised(self, x: Tensor) -> Tensor:
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        size = exact.square().sum(-1, keepdim=True) / self._hidden
        return (exact * torch.rsqrt(size + self._epsilon)).to(x.dtype)


def linear(weight: Tensor, like: nn.Module) -> nn.Linear:
    """x -> x W^T without a bias, in the type and on the device of the parameters of `like`."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    set_weight(made, weight, next(like.parameters()))
    return made


def set_weight(module: nn.Linear, weight: Tensor, like: Tensor) -> None:
    """Give `module` another weight ``[out, in]``, of whatever shape."""
    module.weight = nn.Parameter(weight.to(like.device, like.dtype).contiguous())
    module.out_features, module.in_features = weight.shape
