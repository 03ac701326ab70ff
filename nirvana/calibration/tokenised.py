"""Pre-tokenised calibration: a .npy of integers ``[examples, tokens]``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nirvana.calibration.files import sha256
from nirvana.errors import NirvanaError


def load(path: Path) -> tuple[Tensor, str]:
    """The ids as int64 ``[examples, tokens]``, and the SHA-256 of the file.

    Raises:
        NirvanaError: no such file, or not a plain array of integers of two dimensions.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise NirvanaError(f"no calibration file at {path}") from None
    except (OSError, ValueError, EOFError, MemoryError):
        # A pickled array lands here: it is never unpickled, because that could run any code.
        raise NirvanaError(f"{path} is not a plain .npy array of numbers; save one with numpy.save") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu" or array.ndim != 2:
        what = f"{array.dtype} of shape {list(array.shape)}" if isinstance(array, np.ndarray) else "an archive"
        raise NirvanaError(f"{path} holds {what}; give integers [examples, tokens]")
    return torch.from_numpy(array.astype(np.int64)), sha256(path)
