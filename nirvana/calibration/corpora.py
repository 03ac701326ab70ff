"""What a calibration or evaluation source means: a corpus name, a data set on the Hub, files, or a mixture of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from nirvana.calibration import hub
from nirvana.calibration.files import find_files, read_file, sha256
from nirvana.calibration.hub import HubCorpus, open_hub
from nirvana.calibration.rows import INSTRUCTION, MBPP, QUESTION, Document, is_blank
from nirvana.errors import NirvanaError

DATA = Path(__file__).parent.parent / "data"

#: Corpus name -> folder of text files that come with the package.
BUILT_IN = {"novels": DATA / "calibration"}

#: Held-out text that comes with the package; no book of it is in a calibration corpus.
EVALUATION = DATA / "evaluation"

#: Corpus name -> where it is on the Hub. All are Parquet or JSON without a script. A name means the same everywhere: a
#: folder of that name is written ./c4.
CORPORA = {
    "c4": HubCorpus("allenai/c4", config="en", held_out="validation", field="text"),
    "wikitext2": HubCorpus("Salesforce/wikitext", config="wikitext-2-raw-v1", held_out="test", field="text", join="\n"),
    # The original has a script; this mirror holds the same sentences as Parquet.
    "bookcorpus": HubCorpus("rojagtap/bookcorpus", field="text", join=" "),
    # Has a script as well, but the Hub keeps a Parquet conversion in a branch.
    "ptb": HubCorpus(
        "ptb-text-only/ptb_text_only",
        held_out="test",
        revision="refs/convert/parquet",
        files="penn_treebank/{split}/*.parquet",
        field="sentence",
        join=" ",
    ),
    "lambada": HubCorpus("EleutherAI/lambada_openai", config="en", split="test", field="text"),
    "gsm8k": HubCorpus("openai/gsm8k", config="main", held_out="test", form=QUESTION),
    "mbpp": HubCorpus("google-research-datasets/mbpp", config="full", held_out="test", form=MBPP),
    "alpaca": HubCorpus("tatsu-lab/alpaca", form=INSTRUCTION),
}

CORPUS_NAMES = (*BUILT_IN, *CORPORA)


class Source(Protocol):
    """Documents to draw from, and where they come from.

    Attributes:
        name: as the user wrote it.
        scope: which part of the source is ever read, in words that end a sentence; empty for all of it.
    """

    name: str
    scope: str

    def blocks(self, seed: int, at_least: int) -> Iterator[list[tuple[tuple[int, ...], Document]]]:
        """(place, document) in lists of at least `at_least`, unless there are fewer in all."""

    def in_order(self) -> list[Document]:
        """Documents as they are stored."""

    def about(self) -> dict[str, Any]:
        """Origin, for the manifest."""


@dataclass(frozen=True)
class FileSource:
    """Documents of local files. The place of a document is its number among those that are not blank."""

    name: str
    documents: list[Document] = field(repr=False)
    files: list[Path]
    scope: str = ""

    def blocks(self, seed: int, at_least: int) -> Iterator[list[tuple[tuple[int, ...], Document]]]:
        yield [((number,), document) for number, document in enumerate(self.documents)]

    def in_order(self) -> list[Document]:
        return self.documents

    def about(self) -> dict[str, Any]:
        return {"files": {path.name: sha256(path) for path in self.files}}


def read_documents(source: str | Path, *, held_out: bool = False) -> list[Document]:
    """The documents of a source, in order: a corpus name, ``hub:OWNER/NAME:SPLIT:FIELD``, a .txt file (one document), a
    .jsonl or .parquet file (a row each; see `nirvana.calibration.rows`), a folder of such files, or several joined by
    ``+``. ``FILE#FIELD`` takes one field of each row.

    Args:
        held_out: of a named corpus on the Hub take the part that is not calibrated on (its test or validation split,
            where it has one).

    Returns:
        Strings, and lists of messages where the rows are chats (`nirvana.calibration.token_ids` takes both). Of a data
        set on the Hub at most the first 4096.

    Raises:
        NirvanaError: unknown name, missing or unreadable file, no text in it, or no network for a Hub data set.
    """
    return [document for part in split_mixture(source) for document in open_source(part, held_out).in_order()]


def split_mixture(source: str | Path) -> list[str | Path]:
    """``a+b`` -> a, b; a path that exists keeps its plus signs."""
    if isinstance(source, Path) or _exists(source) or ("#" in source and _exists(source.rpartition("#")[0])):
        return [source]
    return list(source.split("+"))


def open_source(source: str | Path, held_out: bool = False) -> Source:
    """Open one source. Files are read, a Hub data set is only asked for.

    Raises:
        NirvanaError: see `read_documents`.
    """
    name = str(source)
    if not name:
        raise NirvanaError(f"no corpus is named; built in is {', '.join(BUILT_IN)}")
    if name.startswith(hub.PREFIX):
        return open_hub(name, hub.parse(name), held_out)
    if name in CORPORA:
        return open_hub(name, CORPORA[name], held_out)
    path, chosen = BUILT_IN.get(name, Path(source)), None
    files = find_files(path)
    if files is None and "#" in name:
        before, _, chosen = name.rpartition("#")
        path = Path(before)
        files = find_files(path)
    if files is None:
        raise NirvanaError(
            f"no corpus or file {name!r}; built in is {', '.join(BUILT_IN)}, on the Hub are {', '.join(CORPORA)} and "
            "hub:OWNER/NAME:SPLIT:FIELD, or give a .txt, .jsonl, .parquet or .npy file or a folder"
        )
    documents = [document for file in files for document in read_file(file, chosen) if not is_blank(document)]
    if not documents:
        raise NirvanaError(f'{name} holds no text (rows need a string field "{chosen or "text"}")')
    return FileSource(name, documents, files)


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # a name too long for any file
        return False
