"""X^T X over tokens, without keeping X."""

from __future__ import annotations

import torch
from torch import Tensor

#: Tokens whose fp32 products are summed at once; the sums themselves are fp64.
CHUNK = 4096


class SecondMoments:
    """Sum over tokens of x x^T, float64 ``[channels, channels]``, in `sum`."""

    def __init__(self, channels: int, device: torch.device):
        self.sum = torch.zeros(channels, channels, dtype=torch.float64, device=device)

    def add(self, x: Tensor) -> None:
        """`x` is ``[tokens, channels]``, any floating-point type; products are in fp32 or better."""
        for part in x.to(torch.promote_types(x.dtype, torch.float32)).split(CHUNK):
            self.sum += part.T @ part
