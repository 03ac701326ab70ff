"""SHA-256 of every file of a checkpoint, in the format of the sha256sum tool: ``sha256sum --check SHA256SUMS``."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from nirvana.errors import NirvanaError

SUMS_FILE = "SHA256SUMS"


def write_sums(folder: Path, known: Mapping[str, str]) -> None:
    """Write the file; `known` holds sums that need not be computed again."""
    files = sorted(file.name for file in folder.iterdir())
    (folder / SUMS_FILE).write_text("".join(f"{known.get(file) or sha256(folder / file)}  {file}\n" for file in files))


def check_sums(folder: Path, progress: Callable[[int], None] = lambda count: None) -> int | None:
    """Read every listed file once.

    Args:
        folder: a checkpoint.
        progress: told the bytes read.

    Returns:
        How many files were compared; None where the folder has no list.

    Raises:
        NirvanaError: a file is missing or not what was written, or the list itself is damaged; the message names it.
    """
    try:
        lines = (folder / SUMS_FILE).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise NirvanaError(f"{folder / SUMS_FILE} cannot be read: {error}") from None
    for line in lines:
        entry = re.fullmatch(r"([0-9a-f]{64})  ([^/]+)", line)
        if entry is None:
            raise NirvanaError(f"{folder / SUMS_FILE} is damaged: {line[:80]!r} is no line of sha256sum")
        expected, name = entry.groups()
        if not (folder / name).is_file():
            raise NirvanaError(f"{folder / name} is missing, {SUMS_FILE} names it; get the whole checkpoint")
        if sha256(folder / name, progress) != expected:
            raise NirvanaError(f"{folder / name} is not what was written: its SHA-256 differs from {SUMS_FILE}")
    return len(lines)


def sha256(file: Path, progress: Callable[[int], None] = lambda count: None) -> str:
    """Of a file's content, in pieces."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while piece := stream.read(1 << 22):
            digest.update(piece)
            progress(len(piece))
    return digest.hexdigest()
