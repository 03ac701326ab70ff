"""The masked model: unit activations zeroed at the input of o_proj and down_proj. It computes what slicing computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from nirvana.architectures import describe
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
            keep = torch.zeros(block.size, device=layer.weight.device)
            keep[list(plan.kept[block.name])] = 1
            channels = keep.repeat_interleave(block.channels)
            handle = layer.register_forward_pre_hook(
                lambda module, inputs, channels=channels: (inputs[0] * channels.to(inputs[0].dtype), *inputs[1:])
            )
            stack.callback(handle.remove)
        yield model
