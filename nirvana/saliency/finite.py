"""Whether all numbers of a walk are finite, without a wait for the device in the middle of it.

NaN and infinity stay in whatever they are added to: to look once, at the end, is enough to know that something is
wrong. What and where is searched only then, by the same walk again with a look at every step: it gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from nirvana.errors import NirvanaError
from nirvana.ops.devices import answers_at_once
from nirvana.saliency.places import devices_of, on_host

Result = TypeVar("Result")


class Finite:
    """Looks at tensors, at once or at the end.

    Args:
        at_once: raise at the first tensor that is not finite; else `all` says at the end whether there was one.
    """

    def __init__(self, at_once: bool = True):
        self._at_once = at_once
        self._flags: list[Tensor] = []
        self._sums: dict[int, Tensor] = {}

    def check(self, tensor: Tensor, fault: Callable[[], str]) -> None:
        """Look at `tensor` as it is now.

        Raises:
            NirvanaError: it is not finite, and `fault` says why; where it returns nothing, something else will.
        """
        finite = torch.isfinite(tensor).all()
        if not self._at_once:
            self._flags.append(finite)
        elif not finite and (message := fault()):
            raise NirvanaError(message)

    def check_sum(self, sums: Tensor, fault: Callable[[], str]) -> None:
        """`check` of a tensor that is added to again and again: looking at the end is enough."""
        if self._at_once:
            self.check(sums, fault)
        else:
            self._sums[id(sums)] = sums

    def all(self) -> bool:
        """Whether everything was finite: one question for each device."""
        flags = [*self._flags, *(torch.isfinite(sums).all() for sums in self._sums.values())]
        return all(host.all() for host in on_host(dict(enumerate(flags))).values())


def explained(
    model: nn.Module,
    walk: Callable[[Finite, Callable[[], None]], Result],
    progress: Callable[[], None] = lambda: None,
) -> Result:
    """``walk(finite, progress)``, and if something was not finite the same again, to raise what is wrong where it is.

    Raises:
        NirvanaError: something is not finite; the message is that of the first `Finite.check` that sees it.
    """
    at_once = all(answers_at_once(device) for device in devices_of(model))
    finite = Finite(at_once)
    try:
        result = walk(finite, progress)
        if finite.all():
            return result
    except torch.linalg.LinAlgError:  # decompositions refuse what is not finite
        if finite.all():
            raise
    return walk(Finite(), lambda: None)
