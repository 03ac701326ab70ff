"""nirvana export: a checkpoint in the format of another runtime."""

from __future__ import annotations

from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from pathlib import Path

from nirvana.commands import options, output
from nirvana.export import FORMATS, export

HELP = "write a checkpoint for llama.cpp (gguf) or onnxruntime (onnx)"
EPILOG = """\
examples:
  nirvana export smaller --format gguf --type q8_0
  nirvana export smaller --format onnx --out smaller-onnx
"""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=options.MODEL_HELP)
    parser.add_argument("--format", required=True, metavar="FORMAT", help=" or ".join(FORMATS))
    parser.add_argument(
        "--out", metavar="PATH", help="file (gguf) or folder (onnx) to make (default: MODEL-TYPE.gguf, MODEL-onnx)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier run left at PATH")
    parser.add_argument(
        "--type",
        metavar="TYPE",
        help="of the matrices; gguf: f16 (default), f32, bf16, q8_0, q5_1, q5_0, q4_1, q4_0; onnx: f32 (default), f16",
    )
    gguf = parser.add_argument_group("gguf")
    gguf.add_argument(
        "--context-length", type=int, metavar="N", help="context that the file announces (default: the model's)"
    )
    onnx = parser.add_argument_group("onnx")
    onnx.add_argument(
        "--cache", action=BooleanOptionalAction, default=None, help="key/value cache in the graph (default: yes)"
    )


def run(args: Namespace) -> None:
    given = {name: getattr(args, name) for name in ("type", "context_length", "cache")}
    made = export(
        args.model,
        args.format,
        args.out,
        overwrite=args.overwrite,
        progress=output.progress(args.quiet or args.json),
        **{name: value for name, value in given.items() if value is not None},
    )
    size = _bytes(made.path)
    if args.json:
        report = {"path": str(made.path), "format": made.format, "bytes": size, **made.details}
        output.print_json({**report, "notes": list(made.notes)})
        return
    for name, value in made.details.items():
        print(f"{name:13} {value}")
    for note in made.notes:
        print(f"note: {note}")
    print(f"{made.format}: {made.path} ({output.megabytes(size)})")


def _bytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
