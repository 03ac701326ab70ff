"""Several devices that are all the CPU: real numbers, and an error where an operation mixes devices, as GPUs raise it.

Fake tensors cannot do this here: on a build without CUDA, autograd aborts on fake CUDA tensors. Devices are called
``meta:0``, ``meta:1``, ...: the one type of device besides the CPU that autograd knows in every build.
"""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class PretendedTensor(Tensor):
    """A tensor of the CPU that says that it is elsewhere."""

    @staticmethod
    def __new__(cls, real: Tensor, device: torch.device):
        shape = {"strides": real.stride(), "storage_offset": real.storage_offset(), "dtype": real.dtype}
        return Tensor._make_wrapper_subclass(cls, real.shape, device=device, **shape)

    def __init__(self, real: Tensor, device: torch.device):
        self.real_tensor = real

    def __repr__(self, *, tensor_contents=None):
        return f"PretendedTensor({self.real_tensor}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        with PretendedDevices():
            return func(*args, **(kwargs or {}))


#: What waits for the device because the host learns a value, or how many there are.
_ASKS = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero")
#: What reads one device and writes another; it waits where that is the CPU.
_COPIES = ("aten::_to_copy", "aten::copy_")


class PretendedDevices(TorchDispatchMode):
    """Inside, tensors can be made on, moved to and computed with on pretended devices.

    Attributes:
        waits: how often the host would have waited for a device, by operation; of all instances.
    """

    waits: ClassVar[Counter] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func._schema.name
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        pretended = [leaf for leaf in given if isinstance(leaf, PretendedTensor)]
        places = {leaf.device for leaf in pretended}
        # A single number of the CPU may be used with tensors of any device.
        whole = {leaf.device for leaf in given if leaf.dim() or isinstance(leaf, PretendedTensor)}
        if places and len(whole) > 1 and name not in _COPIES:
            raise RuntimeError(f"expected one device, found {', '.join(sorted(map(str, whole)))} in {name}")
        asked = kwargs.get("device")
        target = torch.device(asked) if asked is not None else next(iter(places), torch.device("cpu"))
        if name == "aten::copy_":
            target = args[0].device
        if places and (name in _ASKS or (name in _COPIES and target.type == "cpu")):
            PretendedDevices.waits[name] += 1
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        owners = {id(leaf.real_tensor): leaf for leaf in pretended}

        def wrapped(result):
            if not isinstance(result, Tensor) or target.type == "cpu":
                return result
            # What was changed in place comes back as what it was.
            return owners[id(result)] if id(result) in owners else PretendedTensor(result, target)

        def real(leaf):
            return leaf.real_tensor if isinstance(leaf, PretendedTensor) else leaf

        return tree_map(wrapped, func(*tree_map(real, args), **tree_map(real, kwargs)))


def move(module: nn.Module, device: str) -> None:
    """Parameters and buffers of a module and its parts, in place; those that have been moved stay where they are."""
    place = torch.device(device)
    moved: dict[nn.Parameter, nn.Parameter] = {}  # tied weights stay tied
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and not isinstance(parameter.data, PretendedTensor):
                if parameter not in moved:
                    values = PretendedTensor(parameter.detach().clone(), place)
                    moved[parameter] = nn.Parameter(values, requires_grad=parameter.requires_grad)
                part._parameters[name] = moved[parameter]
        for name, buffer in part._buffers.items():
            if buffer is not None and not isinstance(buffer, PretendedTensor):
                part._buffers[name] = PretendedTensor(buffer.clone(), place)
