"""What a command has written, as the disk tells it.

Nothing is said from memory: an interruption may come between a rename and the line that would have remembered it. An
entry knows which file or folder it is about (its device and inode, which a rename does not change) before it gets its
name, and looks whether that is what stands there.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

NOTHING = "nothing was written"


class Entry:
    """One file or folder that is to have its name."""

    def __init__(self, path: Path, words: str | None = None):
        """
        Args:
            path: the name.
            words: what is to be said where it stands; None is "PATH is complete", "" nothing: it is no result.
        """
        self.path = path
        self._words = f"{path} is complete" if words is None else words
        self._identity: tuple[int, int] | None = None

    def identify(self, place: Path) -> None:
        """From now on it is what is at `place`, whatever that will be called."""
        self._identity = _identity(place)

    def stands(self) -> bool:
        """It has its name."""
        return self._identity is not None and self._identity == _identity(self.path)

    def outcome(self) -> str:
        """What is to be said of it; empty where there is nothing to say."""
        return self._words if self.stands() else ""


class Journal:
    """The entries of a command, in the order in which they were begun."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []

    def add(self, entry: Entry) -> None:
        self._entries.append(entry)

    def outcome(self) -> str:
        """One line: what stands, or that nothing was written."""
        # What was written to a name before may have left its inode to what was written last.
        last = {entry.path: entry for entry in self._entries if entry.stands()}
        said = [entry.outcome() for entry in last.values()]
        return "; ".join(words for words in said if words) or NOTHING


_current: Journal | None = None


@contextlib.contextmanager
def recorded() -> Iterator[Journal]:
    """Inside, what is written stands in the journal."""
    global _current
    before, _current = _current, Journal()
    try:
        yield _current
    finally:
        _current = before


def current() -> Journal:
    """The journal of the command that runs; one that nobody reads where none does."""
    return Journal() if _current is None else _current


def goes_on_from(path: Path, words: str) -> None:
    """An earlier run has left `path`, and this one goes on from there: `words` are said where it still stands."""
    entry = Entry(path, words)
    entry.identify(path)
    current().add(entry)


def _identity(place: Path) -> tuple[int, int] | None:
    try:
        found = os.lstat(place)
    except OSError:
        return None
    return found.st_dev, found.st_ino
