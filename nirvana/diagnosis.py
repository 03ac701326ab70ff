"""Why a number is not finite, in one line that names the parameter."""

from __future__ import annotations

import torch
from torch import nn


def faulty_parameter(model: nn.Module) -> str:
    """Name the first parameter that holds NaN or infinity; empty if all are finite."""
    for name, parameter in model.named_parameters():
        if torch.isnan(parameter).any():
            return f"parameter {name} holds NaN; repair the checkpoint"
        if torch.isinf(parameter).any():
            remedy = "repair the checkpoint" if parameter.dtype == torch.float32 else "use --dtype float32"
            return f"parameter {name} holds infinity in {parameter.dtype}; {remedy}"
    return ""


def why_not_finite(model: nn.Module) -> str:
    """The parameter at fault, or else that the model's arithmetic overflows."""
    dtype = next(model.parameters()).dtype
    return faulty_parameter(model) or f"the model's output overflows in {dtype}; use --dtype float32"
