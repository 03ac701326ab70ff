"""The user's files -> documents: .txt, .jsonl, .parquet and folders of them.

They are read here and not through `datasets`: that library takes two seconds to import, copies every file into a cache
of its own before the first row comes, wants the same columns in every row, and does not say which line is wrong.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from nirvana.calibration.rows import Document, Form, RowError, form_of, row_document
from nirvana.errors import NirvanaError


def find_files(path: Path) -> list[Path] | None:
    """The text files that a path stands for, in order of name; None if there is nothing at it.

    Raises:
        NirvanaError: a file of another type, or a folder without any of these.
    """
    try:
        is_folder, is_file = path.is_dir(), path.is_file()
    except OSError:  # a name too long for any file
        return None
    if is_folder:
        files = sorted(file for file in path.iterdir() if file.suffix in READERS and file.is_file())
        if not files:
            raise NirvanaError(f"folder {path} holds no text: it has no {', '.join(READERS)} file")
        return files
    if is_file:
        if path.suffix not in READERS:
            raise NirvanaError(
                f"{path}: files of type {path.suffix!r} are not read; use .txt, .jsonl, .parquet or .npy"
            )
        return [path]
    return None


def read_file(path: Path, field: str | None = None) -> list[Document]:
    """All documents of one file; a .txt is one.

    Args:
        field: the field of each row to take; None recognises the forms in `nirvana.calibration.rows`.

    Raises:
        NirvanaError: unreadable, not UTF-8, or a row without text.
    """
    return READERS[path.suffix](path, field)


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _read_text(path: Path, field: str | None = None) -> str:
    if field is not None:
        raise NirvanaError(f"{path} is plain text and has no field {field!r}; leave '#{field}' out")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise NirvanaError(f"cannot read {path} as UTF-8 text: {error}") from None


def _read_jsonl(path: Path, field: str | None) -> list[Document]:
    documents = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: not JSON, endless numbers
            raise NirvanaError(f"{path}, line {number} is not JSON: {error}") from None
        try:
            documents.append(row_document(row, field))
        except RowError as error:
            raise NirvanaError(f"{path}, line {number} {error}{_remedy(path, field)}") from None
    return documents


def _read_parquet(path: Path, field: str | None) -> list[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise NirvanaError(f"reading {path} needs pyarrow: pip install 'nirvana[data]'") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        try:
            form = form_of(names, field)
        except RowError as error:
            reason = str(error).replace("string field", "field").replace("field", "column")
            raise NirvanaError(f"{path} {reason}{_remedy(path, field)}") from None
        rows = file.read(columns=[name for name in names if name in form.fields]).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise NirvanaError(f"cannot read {path} as Parquet: {str(error).splitlines()[0]}") from None
    except UnicodeDecodeError as error:
        raise NirvanaError(f"cannot read {path} as UTF-8 text: {error}") from None
    return [_parquet_document(path, number, row, form) for number, row in enumerate(rows) if _has_text(row, form)]


def _has_text(row: dict[str, object], form: Form) -> bool:
    """Parquet has a null for what a row does not hold; such rows, and columns of another type, are left out."""
    return all(isinstance(row[name], str | list) for name in form.required)


def _parquet_document(path: Path, number: int, row: dict[str, object], form: Form) -> Document:
    try:
        return form.document(row)
    except RowError as error:
        raise NirvanaError(f"{path}, row {number} {error}") from None


def _remedy(path: Path, field: str | None) -> str:
    return "" if field is not None else f"; write '{path.name}#FIELD' to read another one"


READERS: dict[str, Callable[[Path, str | None], list[Document]]] = {
    ".txt": lambda path, field: [_read_text(path, field)],
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
