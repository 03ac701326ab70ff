"""Text on disk -> documents. Built-in corpora and the user's files end here as a list of strings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from nirvana.errors import NirvanaError

DATA = Path(__file__).parent.parent / "data"

#: Corpus name -> folder of text files that come with the package.
BUILT_IN = {"novels": DATA / "calibration"}

#: Held-out text that comes with the package; no book of it is in a calibration corpus.
EVALUATION = DATA / "evaluation"

TEXT_FIELD = "text"


def read_documents(source: str | Path) -> list[str]:
    """The documents of a corpus name, a .txt file (one document), a .jsonl or .parquet file (rows with a "text" field),
    or a folder of .txt files.

    Raises:
        NirvanaError: unknown name, missing or unreadable file, or no text in it.
    """
    if not str(source):
        raise NirvanaError(f"no corpus is named; built in is {', '.join(BUILT_IN)}")
    path = BUILT_IN.get(str(source), Path(source))
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError:  # a name too long for any file
        is_folder = is_file = False
    if is_folder:
        documents = [_read_text(file) for file in sorted(path.glob("*.txt"))]
    elif is_file:
        reader = _READERS.get(path.suffix)
        if reader is None:
            raise NirvanaError(
                f"{path}: files of type {path.suffix!r} are not read; use .txt, .jsonl, .parquet or .npy"
            )
        documents = reader(path)
    else:
        raise NirvanaError(
            f"no corpus or file {str(source)!r}; built in is {', '.join(BUILT_IN)}, "
            "or give a .txt, .jsonl, .parquet or .npy file"
        )
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise NirvanaError(f'{source} holds no text (rows need a string field "{TEXT_FIELD}")')
    return documents


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise NirvanaError(f"cannot read {path} as UTF-8 text: {error}") from None


def _read_jsonl(path: Path) -> list[str]:
    documents = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: not JSON, endless numbers
            raise NirvanaError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get(TEXT_FIELD), str):
            fields = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise NirvanaError(f'{path}, line {number} has no string field "{TEXT_FIELD}" (it has: {fields})')
        if not _is_unicode(row[TEXT_FIELD]):
            raise NirvanaError(f"{path}, line {number} holds half a surrogate pair, which is no text")
        documents.append(row[TEXT_FIELD])
    return documents


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_parquet(path: Path) -> list[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise NirvanaError(f"reading {path} needs pyarrow: pip install 'nirvana[data]'") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        if TEXT_FIELD not in file.schema_arrow.names:
            raise NirvanaError(f'{path} has no column "{TEXT_FIELD}" (it has: {", ".join(file.schema_arrow.names)})')
        table = file.read(columns=[TEXT_FIELD])
    except (pyarrow.ArrowException, OSError) as error:
        raise NirvanaError(f"cannot read {path} as Parquet: {str(error).splitlines()[0]}") from None
    return [document for document in table.column(TEXT_FIELD).to_pylist() if isinstance(document, str)]


_READERS: dict[str, Callable[[Path], list[str]]] = {
    ".txt": lambda path: [_read_text(path)],
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
