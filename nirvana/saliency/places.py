"""Where a model's tensors are: one device, or several that its layers are divided among."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from nirvana.architectures import Architecture
from nirvana.errors import NirvanaError

Key = TypeVar("Key", bound=Hashable)


def devices_of(model: nn.Module) -> set[torch.device]:
    """The devices of all parameters.

    Raises:
        NirvanaError: a parameter is offloaded: accelerate puts another one in its place for each forward pass.
    """
    for name, parameter in model.named_parameters():
        if parameter.device == torch.device("meta"):
            raise NirvanaError(
                f"parameter {name} is offloaded and has no gradient to score; load the model with a device_map that "
                "names no 'cpu' and no 'disk'"
            )
    return {parameter.device for parameter in model.parameters()}


def empty_scores(model: nn.Module, architecture: Architecture) -> dict[str, Tensor]:
    """Block name -> zeros fp32 ``[units]``, where the block's output layer is."""
    places = {block.name: model.get_submodule(block.output).weight.device for block in architecture.blocks}
    return {block.name: torch.zeros(block.size, device=places[block.name]) for block in architecture.blocks}


def on_host(tensors: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
    """The same tensors on the CPU, with one copy, and one wait, for each device and type."""
    groups: dict[tuple[torch.device, torch.dtype], list[Key]] = {}
    for key, tensor in tensors.items():
        groups.setdefault((tensor.device, tensor.dtype), []).append(key)
    found: dict[Key, Tensor] = {}
    for keys in groups.values():
        joined = torch.cat([tensors[key].flatten() for key in keys]).cpu()
        parts = joined.split([tensors[key].numel() for key in keys])
        found |= {key: part.view(tensors[key].shape).clone() for key, part in zip(keys, parts, strict=True)}
    return {key: found[key] for key in tensors}
