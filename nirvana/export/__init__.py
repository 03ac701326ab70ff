"""A checkpoint in the format of another runtime. Every format is imported only when it is asked for."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nirvana.errors import NirvanaError
from nirvana.progress import Progress

#: Format -> module, function in it, extra that installs what it needs, options of its own.
FORMATS = {
    "gguf": ("nirvana.export.gguf", "export_gguf", "gguf", ("type", "context_length")),
    "onnx": ("nirvana.export.onnx", "export_onnx", "onnx", ("type", "cache")),
}

#: --type -> what the ONNX export calls it.
ONNX_TYPES = {"f32": "float32", "f16": "float16"}


@dataclass(frozen=True)
class Exported:
    """What an export made.

    Attributes:
        path: the file or folder.
        format: "gguf" or "onnx".
        details: what is inside, as the command line prints it.
        notes: what a user of the file should know: tensors that did not take the type that was asked for, and the like.
    """

    path: Path
    format: str
    details: dict[str, str]
    notes: tuple[str, ...] = ()


def export(
    source: str | Path,
    format: str = "gguf",  # noqa: A002 (the name of the option)
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> Exported:
    """Write a model in the format of another runtime.

    Args:
        source: what `nirvana.load` opens: a checkpoint folder (pruned or dense), Hub id, .gguf file or "demo".
        format: "gguf" (llama.cpp and all that is built on it) or "onnx" (onnxruntime).
        out: file (gguf) or folder (onnx) to make; by default named after the source, beside it.
        overwrite: replace what an earlier run left at `out`.
        progress: told the bytes written.
        **options: gguf: ``type`` ("f16", "f32", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0") and ``context_length``;
            onnx: ``type`` ("f32", "f16") and ``cache`` (True: a graph with key/value cache inputs and outputs).

    Raises:
        NirvanaError: unknown format or option, missing packages, a model that the runtime would compute wrongly, or an
            `out` that is refused. Nothing is written then.
    """
    if format not in FORMATS:
        raise NirvanaError(f"--format {format!r} must be one of {', '.join(FORMATS)}")
    module, function, extra, allowed = FORMATS[format]
    for name in options:
        if name not in allowed:
            takers = ", ".join(other for other, entry in FORMATS.items() if name in entry[3]) or "no format"
            raise NirvanaError(f"--{name.replace('_', '-')} is an option of {takers}, not of --format {format}")
    try:
        write = getattr(importlib.import_module(module), function)
    except ImportError as error:
        raise NirvanaError(f"--format {format} needs {error.name or error}: pip install 'nirvana[{extra}]'") from None
    if out is None:
        out = default_name(source, format, options.get("type"))
    if format == "onnx" and (kind := options.pop("type", None)) is not None:
        if kind not in ONNX_TYPES:
            raise NirvanaError(f"--type {kind!r} must be one of {', '.join(ONNX_TYPES)} for --format onnx")
        options["dtype"] = ONNX_TYPES[kind]
    made = write(source, out, overwrite=overwrite, progress=progress, **options)
    return made if isinstance(made, Exported) else Exported(Path(made), format, {})


def default_name(source: str | Path, format: str, kind: str | None) -> Path:  # noqa: A002
    """Where an export goes that was given no name: beside a folder or file, in the working folder for other models."""
    path = Path(source)
    place = path.absolute().parent if path.exists() else Path.cwd()
    stem = path.name.removesuffix(".gguf") if path.name not in ("", "..") else path.resolve().name
    if format == "gguf":
        return place / f"{stem}-{(kind or 'f16').lower()}.gguf"
    return place / f"{stem}-{format}"
