"""nirvana check: is a checkpoint folder whole, and what opens it?"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import asdict

from nirvana.checkpoint.check import check
from nirvana.commands import output

HELP = "verify a checkpoint folder and list what opens it; reads headers only and runs nothing from the folder"
EPILOG = """\
examples:
  nirvana check smaller
  nirvana check smaller --hashes      # also compares the content of every file with what was written

exit code 2 and one line where something is missing, damaged or contradicts itself
"""


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("folder", metavar="DIR", help="checkpoint folder")
    parser.add_argument("--hashes", action="store_true", help="read every file and compare it with SHA256SUMS")


def run(args: Namespace) -> None:
    report = check(args.folder, hashes=args.hashes, progress=output.progress(args.quiet or args.json))
    if args.json:
        output.print_json(asdict(report) | {"folder": str(report.folder)})
        return
    print(f"{args.folder} is whole: {report.model_type}, {report.tensors} tensors, {output.megabytes(report.bytes)}")
    if report.hashed is not None:
        print(f"{report.hashed} files are what was written")
    for note in report.notes:
        print(f"note: {note}")
    print()
    width = max(len(opener.runtime) for opener in report.openers)
    for opener in report.openers:
        print(f"{opener.runtime:{width}}  {'opens it' if opener.opens else 'does not'}  {opener.needs}")
    sizes = ", ".join(map(str, report.tensor_parallel))
    print(f"\ndevices over which every layer can be split (tensor parallelism, from vLLM's source): {sizes}")
