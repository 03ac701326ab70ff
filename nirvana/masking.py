"""The masked model: unit activations zeroed at the input of o_proj and down_proj. It computes what slicing computes."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from nirvana.architectures import Block, describe
from nirvana.plan import PruningPlan


@contextlib.contextmanager
def masked(model: nn.Module, plan: PruningPlan) -> Iterator[nn.Module]:
    """Inside, `model` computes what the sliced model would: no copy, no reload. Afterwards it is as before.

    Raises:
        NirvanaError: the plan does not fit the model; the message names the block.
    """
    architecture = describe(model)
    plan.check_fits(architecture)
    with contextlib.ExitStack() as stack:
        for block in architecture.blocks:
            layer = model.get_submodule(block.output)
            channels = kept_channels(block, plan.kept[block.name], layer.weight.device)
            handle = layer.register_forward_pre_hook(
                lambda module, inputs, channels=channels: (inputs[0] * channels.to(inputs[0].dtype), *inputs[1:])
            )
            stack.callback(handle.remove)
        yield model


def kept_channels(block: Block, kept: Collection[int], device: torch.device) -> Tensor:
    """Which input channels of a block's output layer belong to units that stay, bool ``[channels]``."""
    units = torch.zeros(block.size, dtype=torch.bool)
    units[list(kept)] = True
    return units.repeat_interleave(block.channels).to(device)
