"""The output layers of a model (o_proj, down_proj), kept aside to go back to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from nirvana.architectures import Architecture, Block


class OutputWeights:
    """A copy of the weights and biases of all output layers: about a third of the prunable parameters."""

    def __init__(self, model: nn.Module, architecture: Architecture):
        self._blocks = architecture.blocks
        self._live = {b.output: dict(model.get_submodule(b.output).named_parameters()) for b in self._blocks}
        self._saved = self._copy()

    @torch.no_grad()
    def restore(self) -> None:
        """Put the copy back into the model."""
        self._put(self._saved)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, the model has these weights; afterwards those that it had before."""
        now = self._copy()
        self.restore()
        try:
            yield
        finally:
            self._put(now)

    def blends(self) -> Blends:
        """Mixtures of the weights that the model has now with this copy."""
        return Blends(self._blocks, self._live, self._saved, self._copy())

    def _copy(self) -> dict[str, dict[str, torch.Tensor]]:
        return {layer: {n: p.detach().clone() for n, p in live.items()} for layer, live in self._live.items()}

    @torch.no_grad()
    def _put(self, values: dict[str, dict[str, torch.Tensor]]) -> None:
        for layer, live in self._live.items():
            for name, parameter in live.items():
                parameter.copy_(values[layer][name])


class Blends:
    """W + strength (W' - W) in every output layer, where removed columns stay 0.

    Args:
        before, after: weights W (dense) and W' (repaired) by layer and parameter.
    """

    def __init__(self, blocks: tuple[Block, ...], live: dict, before: dict, after: dict):
        self._blocks, self._live, self._before, self._after = blocks, live, before, after

    @torch.no_grad()
    def set(self, attention: float, mlp: float) -> None:
        """Give the model the mixtures: 1 is the repaired layer, 0 the one without repair."""
        for block in self._blocks:
            strength = attention if block.is_attention else mlp
            for name, parameter in self._live[block.output].items():
                before, after = self._before[block.output][name], self._after[block.output][name]
                if name == "weight":
                    before = before * (after != 0).any(dim=0)
                # lerp gives `after` itself at 1 and `before` itself at 0.
                parameter.copy_(torch.lerp(before, after, strength))
