"""Files and directories that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nirvana.errors import NirvanaError

#: A folder with a config.json (a selection.json) and one of these is a model (what 'nirvana select' wrote).
MARKERS = ("config.json", "selection.json")
WEIGHT_SUFFIXES = (".safetensors", ".onnx")


def check_target(path: str | Path, overwrite: bool, directory: bool = False) -> Path:
    """Fail before any work is done if `path` cannot be written.

    Raises:
        NirvanaError: it exists (and `overwrite` is false, or is no checkpoint), or its parent is not a writable folder.
    """
    path = Path(path).absolute()
    if path.exists() or path.is_symlink():
        if not overwrite:
            raise NirvanaError(f"{path} exists; choose another name or pass --overwrite")
        if directory and not _is_replaceable(path):
            raise NirvanaError(
                f"{path} holds something other than a checkpoint and is not overwritten; remove it first"
            )
        if not directory and path.is_dir():
            raise NirvanaError(f"{path} is a folder, a file is to be written there; choose another name")
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise NirvanaError(f"cannot write to {parent}: not a writable folder; choose another place for {path.name}")
    return path


def _is_replaceable(path: Path) -> bool:
    """An empty folder or what nirvana wrote: --overwrite must never delete a home folder given by mistake."""
    if path.is_symlink() or not path.is_dir():
        return False
    content = list(path.iterdir())
    if any(entry.is_dir() for entry in content):
        return False
    marked = any((path / marker).is_file() for marker in MARKERS)
    return not content or (marked and any(entry.suffix in WEIGHT_SUFFIXES for entry in content))


@contextlib.contextmanager
def atomic_directory(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling folder that becomes `path` when the body ends, and vanishes if the body fails.

    An old checkpoint at `path` stays in place until the new one is complete on disk.

    Raises:
        NirvanaError: `path` cannot be written, or the disk refuses (full, read-only, file too large).
    """
    path = check_target(path, overwrite, directory=True)
    partial = _partial_name(path)
    with _parents(path):
        try:
            partial.mkdir()
            yield partial
            _publish(partial, path, overwrite)
        except OSError as error:
            raise NirvanaError(f"cannot write {path}: {error.strerror or error}; nothing was written") from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _publish(partial: Path, path: Path, overwrite: bool) -> None:
    """Rename the complete folder; an old checkpoint moves aside first and comes back if that fails."""
    _sync(partial)
    if not path.exists():
        os.rename(partial, path)
        return
    check_target(path, overwrite, directory=True)  # it may have appeared while we were writing
    retired = Path(tempfile.mkdtemp(prefix=f".{path.name}.old-", dir=path.parent))
    try:
        os.rename(path, retired / path.name)
        os.rename(partial, path)
    except BaseException:
        if not path.exists():
            os.rename(retired / path.name, path)
        raise
    # Only now, when the new one is in place, the old one goes.
    shutil.rmtree(retired)


def write_file(path: str | Path, content: bytes, overwrite: bool = False) -> None:
    """Write a file that appears whole or not at all.

    Raises:
        NirvanaError: as `atomic_file`.
    """
    with atomic_file(path, overwrite) as partial:
        partial.write_bytes(content)


@contextlib.contextmanager
def atomic_file(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """The name of a temporary sibling file that becomes `path` when the body ends, and vanishes if the body fails.

    Raises:
        NirvanaError: as `atomic_directory`.
    """
    path = check_target(path, overwrite)
    partial = _partial_name(path)
    with _parents(path):
        try:
            yield partial
            _sync(partial)
            os.replace(partial, path)
        except OSError as error:
            raise NirvanaError(f"cannot write {path}: {error.strerror or error}; nothing was written") from None
        finally:
            # After a too long name even this fails; the error above is the one to tell.
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def _partial_name(path: Path) -> Path:
    """A hidden name beside `path`. It is known before anything exists, so that an interruption can never leave it."""
    return path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")


@contextlib.contextmanager
def _parents(path: Path) -> Iterator[None]:
    """Make missing parent folders; they go again if the body fails."""
    missing = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NirvanaError(f"cannot write {path}: {error.strerror or error}") from None
    try:
        yield
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):  # somebody else may have put something there
                folder.rmdir()
        raise


def _sync(path: Path) -> None:
    """Flush a file, or every file of a folder, to the disk: a rename must not overtake the data it publishes."""
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
