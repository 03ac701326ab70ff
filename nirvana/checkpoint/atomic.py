"""Files and directories that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from nirvana.checkpoint.journal import Entry, current
from nirvana.errors import NirvanaError
from nirvana.interruption import interruptions_held

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
def atomic_directory(path: str | Path, overwrite: bool = False, words: str | None = None) -> Iterator[Path]:
    """A temporary sibling folder that becomes `path` when the body ends, and vanishes if the body fails.

    An old checkpoint at `path` stays in place until the new one is complete on disk. Whenever an interruption comes,
    `path` is the old one or the new one, and nothing else is left; `nirvana.checkpoint.journal` says which.

    Args:
        path: the folder to make.
        overwrite: replace an older checkpoint there.
        words: for the journal, see `nirvana.checkpoint.journal.Entry`.

    Raises:
        NirvanaError: `path` cannot be written, or the disk refuses (full, read-only, file too large).
    """
    with _appearing(_Write(check_target(path, overwrite, directory=True), words), overwrite, directory=True) as partial:
        partial.mkdir()
        yield partial


def write_file(path: str | Path, content: bytes, overwrite: bool = False, words: str | None = None) -> None:
    """Write a file that appears whole or not at all.

    Raises:
        NirvanaError: as `atomic_file`.
    """
    with atomic_file(path, overwrite, words) as partial:
        partial.write_bytes(content)


@contextlib.contextmanager
def atomic_file(path: str | Path, overwrite: bool = False, words: str | None = None) -> Iterator[Path]:
    """The name of a temporary sibling file that becomes `path` when the body ends, and vanishes if the body fails.

    Args and what is guaranteed: as `atomic_directory`.

    Raises:
        NirvanaError: as `atomic_directory`.
    """
    with _appearing(_Write(check_target(path, overwrite), words), overwrite, directory=False) as partial:
        yield partial


@contextlib.contextmanager
def _appearing(write: _Write, overwrite: bool, directory: bool) -> Iterator[Path]:
    journal = current()
    journal.add(write)
    try:
        try:
            write.path.parent.mkdir(parents=True, exist_ok=True)
            yield write.partial
            _sync(write.partial)
            write.publish(overwrite, directory)
        finally:
            # Twice: Ctrl-C may come in the moment before the first holds it.
            try:
                write.settle()
            finally:
                write.settle()
    except OSError as error:
        raise NirvanaError(f"{write.failure()}: {error.strerror or error}; {journal.outcome()}") from None


class _Write(Entry):
    """The steps on disk. All names are known before anything exists, so that an interruption can never hide one."""

    def __init__(self, path: Path, words: str | None):
        super().__init__(path, words)
        token = secrets.token_hex(4)
        self.partial = path.with_name(f".{path.name}.partial-{token}")
        self._retired = path.with_name(f".{path.name}.old-{token}")
        self._missing = [folder for folder in path.parents if not folder.exists()]

    def publish(self, overwrite: bool, directory: bool) -> None:
        """Rename what is complete; an old folder moves aside first, and goes when the new one is in place."""
        self.identify(self.partial)
        with interruptions_held():
            check_target(self.path, overwrite, directory)  # it may have appeared while we were writing
            if directory and self.path.exists():
                os.rename(self.path, self._retired)
            os.replace(self.partial, self.path)
            if self._retired.exists():
                shutil.rmtree(self._retired)

    def settle(self) -> None:
        """What was there comes back unless the new one is in its place; what is hidden goes, new parents too.

        It looks at the disk only, so that it may be called at any time, and again.
        """
        with interruptions_held():
            if self.stands():
                shutil.rmtree(self._retired, ignore_errors=True)
                return
            # What fails here has failed before, and that error is the one to tell.
            with contextlib.suppress(OSError):
                if not os.path.lexists(self.path):
                    os.rename(self._retired, self.path)
            with contextlib.suppress(OSError):
                self.partial.unlink()
            shutil.rmtree(self.partial, ignore_errors=True)
            for folder in self._missing:
                with contextlib.suppress(OSError):  # somebody else may have put something there
                    folder.rmdir()

    def failure(self) -> str:
        """What the disk has refused."""
        left = os.path.lexists(self._retired)
        if self.stands():
            return f"cannot remove {self._retired}, the old {self.path.name}" if left else f"after writing {self.path}"
        return f"cannot write {self.path}" + (f", and the old one is now {self._retired}" if left else "")


def _sync(path: Path) -> None:
    """Flush a file, or every file of a folder, to the disk: a rename must not overtake the data it publishes."""
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
