"""Which layers keep their activations for the backward pass, and which keep their input alone and run again.

To run layers again costs a forward pass, a third more products than forward and backward take, and takes the memory
from all layers' activations to one's. The bits of the gradients are the same.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from nirvana.ops.devices import free_bytes
from nirvana.ops.head import workspace_bytes
from nirvana.patching import forward_replaced


@contextlib.contextmanager
def layers_checkpointed(
    model: nn.Module, choice: bool | None, *, unasked: bool = True, reserve: int = 0
) -> Iterator[None]:
    """Inside, layers are checkpointed.

    transformers' own switch works in training mode alone, where dropout would be on.

    Args:
        choice: True: all; False: none; None: those that the free memory of their device has no room for.
        unasked: what None means on a device whose free memory is no matter (`free_bytes`).
        reserve: bytes that the caller will take during the passes.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    room = _Room(layers, reserve) if choice is None else None
    with contextlib.ExitStack() as stack:
        for layer in layers:
            run = functools.partial(_run, layer, room, unasked if choice is None else choice)
            stack.enter_context(forward_replaced(layer, functools.partial(functools.partial, run)))
        yield


def _run(layer: nn.Module, room: _Room | None, otherwise: bool, forward: Callable, *args: Any, **kwargs: Any) -> Any:
    again = otherwise
    if room is not None and (fits := room.fits(layer, args, kwargs)) is not None:
        if fits:
            with room.measured(layer):
                return forward(*args, **kwargs)
        again = True
    if not again:
        return forward(*args, **kwargs)
    # Dropout is off: there is no random state to keep, which on a GPU would be a copy to the host for each layer.
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


class _Room:
    """The free memory of each device, and what the layers that have run took of it.

    Decided when a layer runs for the first time; later passes do the same. A layer is taken to need what the largest
    so far did, and backward twice that besides: the gradients of what it saved, and of their intermediate steps.
    """

    def __init__(self, layers: list[nn.Module], reserve: int):
        self._layers = layers
        self._reserve = reserve
        self._left: dict[torch.device, int | None] = {}
        self._largest = 0
        self._decided: dict[nn.Module, bool | None] = {}
        self._counted: set[nn.Module] = set()

    def fits(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> bool | None:
        """Whether `layer` may keep its activations; None where memory is no matter."""
        if layer not in self._decided:
            device = next(layer.parameters()).device
            if device not in self._left:
                self._left[device] = self._room(device, args, kwargs)
            left = self._left[device]
            self._decided[layer] = None if left is None else left >= 3 * self._largest
        return self._decided[layer]

    def _room(self, device: torch.device, args: tuple, kwargs: dict[str, Any]) -> int | None:
        free = free_bytes(device)
        if free is None:
            return None
        inputs = max(leaf.nbytes for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        gradients = max(sum(p.nbytes for p in layer.parameters()) for layer in self._layers)
        # Every layer's input exists either way. The head has its own, its gradient in fp32, and the chunks.
        return free - self._reserve - gradients - (len(self._layers) + 6) * inputs - workspace_bytes(device)

    @contextlib.contextmanager
    def measured(self, layer: nn.Module) -> Iterator[None]:
        """Inside, what is saved for the backward pass is counted: each storage once, weights not at all."""
        if layer in self._counted:
            yield
            return
        self._counted.add(layer)
        known = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
        count = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal count
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                known.add(storage.data_ptr())
                count += storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield
        device = next(layer.parameters()).device
        self._largest = max(self._largest, count)
        self._left[device] -= count
