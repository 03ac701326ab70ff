"""nirvana compare: criteria side by side on one model, at the same number of kept parameters."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nirvana.commands import options, output
from nirvana.comparison import Comparison, compare
from nirvana.comparison.compare import NOVELS
from nirvana.comparison.record import FILE, PLOT, TABLE
from nirvana.comparison.table import cells, dense_cells, groups, notes, title
from nirvana.errors import NirvanaError

HELP = "compare criteria on one model: same data, same kept parameters"
EPILOG = """\
examples:
  nirvana compare demo --criteria nirvana,flap,magnitude --sparsity .2,.5
  nirvana compare demo --criteria nirvana,wanda-sp --sparsity .5 --scope mlp --repair none,least-squares
  nirvana compare ./my-llama --sparsity .2 --calibration my.jsonl --text novels --text wiki=wiki.test.raw.txt --out all
  nirvana compare demo --sparsity .2 --tasks arc_easy,mine=questions.jsonl     # pip install 'nirvana[eval]'

Rows are kept in --out as they come: interrupted, the same command goes on; with more criteria, sparsities, texts or
tasks it adds them.
"""


def add_arguments(parser: ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument(
        "--out",
        default="comparison",
        metavar="PATH",
        help=f"folder for {FILE}, {TABLE}, {PLOT} and the scores (default: comparison)",
    )
    parser.add_argument("--overwrite", action="store_true", help="begin anew where PATH holds a comparison")
    options.add_comparison(parser)


def run(args: Namespace) -> None:
    texts = named(args.text or [NOVELS], "text")
    found = compare(
        args.model,
        texts={name: None if (name, file) == (NOVELS, "") else file or name for name, file in texts.items()},
        tasks={name: file or None for name, file in named(args.tasks, "tasks").items()},
        progress=output.progress(args.quiet or args.json),
        **{name: getattr(args, name) for name in COMPARE_OPTIONS},
    )
    if args.json:
        output.print_json(as_dict(found))
        return
    document = {"dense": found.dense, "scoring": found.scoring, "about": found.about}
    print(dense_cells(document))
    for (sparsity, scope), rows in groups(found.rows).items():
        print(f"\n{title(sparsity, scope)}")
        print_table(cells(document, rows))
    print()
    for line in notes(document):
        print(line)
    if found.resumed:
        print(f"{found.resumed} of {len(found.rows)} rows were finished before")
    if not (Path(found.folder) / PLOT).exists():
        possible = any("impossible" not in row for row in found.rows)
        print("no plot: " + (PLOTLESS if possible else "no row is possible"))
    print(f"written: {found.folder}/{FILE}, {TABLE}")


def named(entries: Sequence[str], option: str) -> dict[str, str]:
    """NAME or NAME=FILE, each name once: name -> file, empty where there is none."""
    found: dict[str, str] = {}
    for entry in entries:
        name, equals, file = entry.partition("=")
        if not name or (equals and not file):
            raise NirvanaError(f"--{option} {entry!r} is neither a name nor NAME=FILE")
        if name in found:
            raise NirvanaError(f"--{option} names {name} twice; give each a name of its own")
        found[name] = file
    return found


def as_dict(found: Comparison) -> dict[str, Any]:
    """JSON-ready."""
    return {
        "folder": str(found.folder),
        "resumed": found.resumed,
        "settings": found.settings,
        "about": found.about,
        "dense": found.dense,
        "scoring": found.scoring,
        "rows": found.rows,
    }


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """The last column, which may be long and is often empty, stands below its row."""
    output.print_table([row[:-1] for row in rows])
    for row in rows[1:]:
        if row[-1]:
            print(f"  {', '.join(name for name in row[:3] if name != 'none')}: {row[-1]}")


PLOTLESS = "it needs matplotlib (pip install 'nirvana[bench]')"

#: Options that go to `nirvana.compare` under their own names.
COMPARE_OPTIONS = (
    "criteria",
    "sparsity",
    "scope",
    "allocation",
    "repair",
    "calibration",
    "num_examples",
    "seq_len",
    "packing",
    "seed",
    "micro_batch",
    "gamma",
    "align",
    "window",
    "windows",
    "limit",
    "task_dtype",
    "out",
    "overwrite",
    "dtype",
    "device",
    "trust_remote_code",
)
