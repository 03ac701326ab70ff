"""The state of a selection on disk, so that an interrupted one goes on.

One file, rewritten after each candidate as a whole or not at all: a saliency file of the best candidate so far whose
settings hold the finished candidates, and what the selection is about.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nirvana.checkpoint.atomic import write_file
from nirvana.checkpoint.journal import goes_on_from
from nirvana.errors import NirvanaError
from nirvana.plan import config_fingerprint
from nirvana.saliency import Saliency

KEY = "selection_state"

#: What the parts of an identity are called to the user.
_WORDS = {"model": "another model", "probe": "another probe", "candidates": "other candidate batches"}


class SelectionState:
    """Finished candidates.

    Attributes:
        table: one JSON-ready record for each.
        best: saliency of the best of them; None where there is none.
    """

    def __init__(self, path: str | Path | None, identity: dict[str, Any]):
        """Read what is there.

        Args:
            path: the file; None keeps nothing.
            identity: JSON-ready; everything on which the results depend.

        Raises:
            NirvanaError: the file is something else, or of a selection with another identity.
        """
        self._path = None if path is None else Path(path)
        self._words = f"finished candidates are kept in {path}; the same command goes on from there"
        self._identity = identity
        self.table: list[dict[str, Any]] = []
        self.best: Saliency | None = None
        if self._path is None or not self._path.exists():
            return
        best = Saliency.load(self._path)
        kept = best.settings.pop(KEY, None)
        if not isinstance(kept, dict) or not {"identity", "table"} <= kept.keys():
            raise NirvanaError(f"{path} is no state of a selection; choose another name")
        for name, value in identity.items():
            if kept["identity"].get(name) != value:
                was = _WORDS.get(name) or f"--{name.replace('_', '-')} {kept['identity'].get(name)} instead of {value}"
                raise NirvanaError(f"{path} is the state of a selection with {was}; remove it or choose another name")
        self.table, self.best = kept["table"], best
        goes_on_from(self._path, self._words)

    def save(self, table: list[dict[str, Any]], best: Saliency) -> None:
        """Replace what is there."""
        if self._path is not None:
            kept = {"identity": self._identity, "table": table}
            content = Saliency(best, {**best.settings, KEY: kept}).to_bytes()
            write_file(self._path, content, overwrite=True, words=self._words)


def model_fingerprint(model: nn.Module) -> str:
    """SHA-256 of the configuration and of all weights, bit by bit."""
    digest = hashlib.sha256(config_fingerprint(model.config).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.dtype} {list(parameter.shape)}".encode())
        # One tensor at a time: on a GPU each is copied to the CPU.
        digest.update(memoryview(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()
