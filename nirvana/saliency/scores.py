"""Saliency: block name -> fp32 scores of its units, with the settings that led to them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from nirvana.checkpoint.atomic import write_file
from nirvana.errors import NirvanaError

FORMAT = "nirvana-saliency"


class Saliency(Mapping[str, Tensor]):
    """Block name -> fp32 ``[units]``, larger = keep.

    The file is safetensors: one fp32 tensor a block under the block's name, and one entry in the metadata,
    ``nirvana-saliency``: JSON with ``version`` (1) and ``settings``.
    """

    def __init__(self, scores: Mapping[str, Tensor], settings: Mapping[str, Any] | None = None):
        self._scores = dict(scores)
        self.settings = dict(settings or {})

    def __getitem__(self, block: str) -> Tensor:
        return self._scores[block]

    def __iter__(self) -> Iterator[str]:
        return iter(self._scores)

    def __len__(self) -> int:
        return len(self._scores)

    def __repr__(self) -> str:
        return f"Saliency({len(self)} blocks, settings={self.settings})"

    def to_bytes(self) -> bytes:
        """The content of the file."""
        # One metadata entry: safetensors does not keep the order of several, and equal runs must give equal bytes.
        return save(self._scores, {FORMAT: json.dumps({"version": 1, "settings": self.settings})})

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the file. It appears whole or not at all.

        Raises:
            NirvanaError: the file exists and `overwrite` is false, or it cannot be written.
        """
        write_file(path, self.to_bytes(), overwrite=overwrite)

    @classmethod
    def load(cls, path: str | Path) -> Saliency:
        """Read a saliency file.

        Raises:
            NirvanaError: no such file, or not a saliency file of this version.
        """
        if not Path(path).is_file():
            raise NirvanaError(f"no saliency file at {path}; make one with 'nirvana score'")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                scores = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise NirvanaError(f"{path} is not a saliency file: {error}") from None
        if FORMAT not in metadata:
            raise NirvanaError(f'{path} is not a saliency file: its metadata has no "{FORMAT}"')
        try:
            about = json.loads(metadata[FORMAT])
            version, settings = about.get("version"), about.get("settings")
        except (ValueError, AttributeError, RecursionError):
            raise NirvanaError(f"{path} is not a saliency file: its metadata cannot be read") from None
        if version != 1:
            raise NirvanaError(f"{path}: saliency version {version!r} is not supported; this release reads 1")
        if not isinstance(settings, dict):
            raise NirvanaError(f"{path} is not a saliency file: its metadata has no settings")
        return cls(scores, settings)
