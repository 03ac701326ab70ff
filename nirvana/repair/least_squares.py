"""Ridge regression that hands the work of removed units to kept ones, accumulated over tokens."""

from __future__ import annotations

import torch
from torch import Tensor

#: Tokens whose fp32 products are summed at once; the sums themselves are fp64.
CHUNK = 4096


class Regression:
    """Least squares of R = X D^T (+ b) over weighted tokens, with the ridge ``ridge * mean(diag C)`` on D.

    C = X^T X and X^T R are all that is kept of the tokens: O(inputs^2) memory, however many tokens there are. With a
    bias both sides are centred first, so that the ridge does not pull on it.

    Args:
        inputs, outputs: widths of X and R.
        bias: whether b is fitted as well.
        device: where the sums live.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool, device: torch.device):
        self._bias = bias
        self._moments = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self._cross = torch.zeros(inputs, outputs, dtype=torch.float64, device=device)
        self._sum_x = torch.zeros(inputs, dtype=torch.float64, device=device)
        self._sum_r = torch.zeros(outputs, dtype=torch.float64, device=device)
        self._weight = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, x: Tensor, r: Tensor, weight: Tensor) -> None:
        """Add tokens: x ``[tokens, inputs]``, r ``[tokens, outputs]``, weights of their squared errors ``[tokens]``."""
        for part in torch.arange(len(x), device=x.device).split(CHUNK):
            scale = weight[part].float().sqrt()[:, None]
            scaled_x, scaled_r = x[part].float() * scale, r[part].float() * scale
            self._moments += scaled_x.T @ scaled_x
            self._cross += scaled_x.T @ scaled_r
            if self._bias:
                self._sum_x += (scaled_x * scale).sum(0)
                self._sum_r += (scaled_r * scale).sum(0)
                self._weight += weight[part].double().sum()

    def solve(self, ridge: float) -> tuple[Tensor, Tensor | None]:
        """D fp64 ``[outputs, inputs]`` and b fp64 ``[outputs]`` (None where no bias is fitted).

        Raises:
            torch.linalg.LinAlgError: C with its ridge is not positive definite.
        """
        moments, cross = self._moments, self._cross
        if self._bias:
            moments = moments - torch.outer(self._sum_x, self._sum_x) / self._weight
            cross = cross - torch.outer(self._sum_x, self._sum_r) / self._weight
        mean = moments.diagonal().mean()
        if mean == 0:  # no input ever moves: nothing can be fitted
            solution = torch.zeros_like(cross)
        else:
            identity = torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
            solution = torch.cholesky_solve(cross, torch.linalg.cholesky(moments + ridge * mean * identity))
        if not self._bias:
            return solution.T, None
        return solution.T, (self._sum_r - self._sum_x @ solution) / self._weight
