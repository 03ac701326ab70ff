"""Files and directories that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nirvana.errors import NirvanaError


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
    """An empty folder or a checkpoint: --overwrite must never delete a home folder that was given by mistake."""
    if path.is_symlink() or not path.is_dir():
        return False
    return (path / "config.json").is_file() or not any(path.iterdir())


@contextlib.contextmanager
def atomic_directory(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling folder that becomes `path` when the body ends, and vanishes if the body fails.

    An old checkpoint at `path` stays in place until the new one is complete on disk.

    Raises:
        NirvanaError: `path` cannot be written, or the disk refuses (full, read-only, file too large).
    """
    path = check_target(path, overwrite, directory=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    except OSError as error:
        raise NirvanaError(f"cannot write {path}: {error.strerror or error}") from None
    try:
        yield partial
        # mkdtemp makes a private folder; the result gets the permissions any new folder would have.
        partial.chmod(0o777 & ~_umask())
        _sync(partial)
        if path.exists():
            check_target(path, overwrite, directory=True)  # it may have appeared while we were writing
            retired = Path(tempfile.mkdtemp(prefix=f".{path.name}.old-", dir=path.parent))
            os.rename(path, retired / path.name)
            try:
                os.rename(partial, path)
            except BaseException:
                os.rename(retired / path.name, path)
                raise
            finally:
                shutil.rmtree(retired)
        else:
            os.rename(partial, path)
    except OSError as error:
        raise NirvanaError(f"cannot write {path}: {error.strerror or error}; nothing was written") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_file(path: str | Path, content: bytes, overwrite: bool = False) -> None:
    """Write a file that appears whole or not at all.

    Raises:
        NirvanaError: as `atomic_directory`.
    """
    path = check_target(path, overwrite)
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=f".{path.name}.partial-", dir=path.parent, delete=False) as file:
            partial = Path(file.name)
            file.write(content)
        partial.chmod(0o666 & ~_umask())
        _sync(partial)
        os.replace(partial, path)
    except OSError as error:
        raise NirvanaError(f"cannot write {path}: {error.strerror or error}; nothing was written") from None
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    """Flush a file, or every file of a folder, to the disk: a rename must not overtake the data it publishes."""
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
