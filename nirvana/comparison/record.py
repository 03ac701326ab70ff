"""A comparison on disk: written anew after each row as a whole or not at all, so that an interrupted one goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nirvana.checkpoint.atomic import check_target, write_file
from nirvana.checkpoint.journal import goes_on_from
from nirvana.comparison.cases import Case
from nirvana.errors import NirvanaError
from nirvana.interruption import interruptions_held
from nirvana.saliency import Saliency

FORMAT, VERSION = "nirvana-comparison", 1
FILE, TABLE, PLOT, SCORES = "compare.json", "compare.md", "compare.png", "saliency-{}.safetensors"

#: What the parts of the settings are called to the user. The rest are options.
_WORDS = {
    "model_sha256": "another model",
    "calibration_sha256": "another calibration batch",
    "texts": "another text {}",
    "tasks": "another task {}",
}


class Record:
    """``{"format", "version", "settings", "about", "dense", "scoring", "rows"}``.

    Attributes:
        document: JSON-ready. A row is a `Case` with its figures; texts and tasks that came later are added to it.
    """

    def __init__(self, folder: str | Path | None, settings: dict[str, Any], about: dict[str, Any], overwrite: bool):
        """Read what is there.

        Args:
            folder: None keeps everything in memory.
            settings: JSON-ready; all that the figures of a row depend on. In ``texts`` and ``tasks`` more names may
                come; the same name must stand for the same.
            about: for readers: the first run's words are kept.
            overwrite: begin anew. What is there stays until there is something to take its place.

        Raises:
            NirvanaError: the folder holds something else, or a comparison with other settings.
        """
        self._folder = None if folder is None else Path(folder)
        self._again = "the same command without --overwrite" if overwrite else "the same command"
        self._stale: set[Path] = set()
        fresh = {"settings": settings, "about": about, "dense": {}, "scoring": {}, "rows": []}
        self.document = {"format": FORMAT, "version": VERSION, **fresh}
        if self._folder is None or not self._folder.exists():
            return
        check_folder(self._folder)
        if overwrite:
            self._stale = {self._folder / TABLE, self._folder / PLOT, *self._folder.glob(SCORES.format("*"))}
            return
        path = self._folder / FILE
        if not path.exists():
            return
        found = read(path)
        for name, value in settings.items():
            was, words = found["settings"].get(name), _WORDS.get(name)
            if isinstance(value, dict):
                was = was or {}
                for key in (key for key in value if key in was and was[key] != value[key]):
                    _refuse(path, words.format(key))
                found["settings"][name] = was | value
            elif was != value:
                _refuse(path, words or f"--{name.replace('_', '-')} {was} instead of {value}")
        found["about"] |= {
            name: found["about"].get(name, {}) | value for name, value in about.items() if isinstance(value, dict)
        }
        self.document = found
        goes_on_from(path, self._words())

    def row(self, case: Case) -> dict[str, Any] | None:
        """What is known of a case."""
        for row in self.document["rows"]:
            if all(row[name] == value for name, value in case._asdict().items()):
                return row
        return None

    def put(self, case: Case, figures: dict[str, Any]) -> None:
        """Add a row or replace it, and write."""
        row = self.row(case)
        if row is None:
            row = case._asdict()
            self.document["rows"].append(row)
        else:
            row.pop("impossible", None)
        row |= figures
        self.save()

    def save(self) -> None:
        with interruptions_held():
            self.write(FILE, (json.dumps(self.document, indent=1, allow_nan=False) + "\n").encode(), self._words())
            for file in self._stale:
                file.unlink(missing_ok=True)
            self._stale.clear()

    def write(self, name: str, content: bytes, words: str = "") -> None:
        """Replace a file of the folder; `words` are what an interrupted command says of it."""
        if self._folder is not None:
            self._stale.discard(self._folder / name)
            write_file(self._folder / name, content, overwrite=True, words=words)

    def _words(self) -> str:
        if self._folder is None:
            return ""
        kept = f"{len(self.document['rows'])} finished rows are in {self._folder / FILE}"
        return f"{kept}; {self._again} goes on from there"

    def saliency(self, criterion: str) -> Saliency | None:
        """The scores of an earlier run with these settings."""
        if self._folder is None or criterion not in self.document["scoring"]:
            return None
        path = self._folder / SCORES.format(criterion)
        return Saliency.load(path) if path.exists() else None

    def put_saliency(self, criterion: str, saliency: Saliency, figures: dict[str, Any]) -> None:
        """Keep scores, and what it took to make them."""
        if self._folder is not None:
            self.write(SCORES.format(criterion), saliency.to_bytes())
        self.document["scoring"][criterion] = figures
        self.save()


def check_folder(folder: str | Path) -> None:
    """Raise NirvanaError unless a comparison may be written there: nothing, an empty folder, or a comparison."""
    folder = Path(folder)
    if not folder.exists():
        check_target(folder, overwrite=False)
    elif not folder.is_dir():
        raise NirvanaError(f"{folder} is a file, a folder is to be written there; choose another --out")
    elif any(folder.iterdir()) and not (folder / FILE).exists() and not _only_ours(folder):
        raise NirvanaError(f"{folder} holds something other than a comparison; choose another --out")
    else:
        check_target(folder / FILE, overwrite=True)


def read(path: Path) -> dict[str, Any]:
    """The document of a comparison."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise NirvanaError(f"{path} cannot be read: {error}; choose another --out or pass --overwrite") from None
    kinds = {"settings": dict, "about": dict, "dense": dict, "scoring": dict, "rows": list}
    if (
        not isinstance(found, dict)
        or (found.get("format"), found.get("version")) != (FORMAT, VERSION)
        or not all(isinstance(found.get(key), kind) for key, kind in kinds.items())
    ):
        raise NirvanaError(f"{path} is no comparison of this release; choose another --out or pass --overwrite")
    return found


def _only_ours(folder: Path) -> bool:
    """What an interruption between two files can leave."""
    prefix, suffix = SCORES.split("{}")
    return all(entry.name.startswith(prefix) and entry.name.endswith(suffix) for entry in folder.iterdir())


def _refuse(path: Path, what: str) -> None:
    raise NirvanaError(f"{path} holds results of {what}; choose another --out or pass --overwrite")
