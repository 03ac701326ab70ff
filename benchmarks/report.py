"""Results as tables on the terminal, as JSON and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nirvana.checkpoint.atomic import write_file
from nirvana.commands import output

COLUMNS = ["", "p20 ms", "p50 ms", "p80 ms", "GB/s", "of limit", "x eager", "x compile"]


#: Columns behind these, and their keys: part of the device's measured copy, and of its data sheet's memory bandwidth.
BESIDE = {"of copy": "of_copy", "of peak": "of_peak"}


def show(document: dict[str, Any]) -> None:
    """Print everything that `tables` makes of a document."""
    about = document["environment"]
    print(f"{document['benchmark']}: {machine(about)}")
    if document["settings"]["quick"]:
        print("quick run: small shapes, a few calls; the figures mean nothing")
    for title, rows in tables(document):
        print(f"\n{title}")
        output.print_table(rows)
    if not document["settings"]["complete"]:
        print("\nout of time: jobs are missing")


def machine(about: dict[str, Any]) -> str:
    if "gpu" in about:
        return f"{about['gpu']}, torch {about['torch']}, Triton {about['triton']}, CUDA {about['cuda']}"
    return f"{about['cpu']}, {about['threads']} threads, load {about['load']}, torch {about['torch']}"


def tables(document: dict[str, Any]) -> list[tuple[str, list[list[str]]]]:
    """Title and rows, the header first, of each job and of each list of records."""
    result = []
    for job in document["jobs"]:
        result.append((f"{job['job']}: {job['bytes'] / 1e6:,.1f} MB", _job_rows(job)))
    for title, records in document["records"].items():
        if records:
            names = list(records[0])
            header = [name.replace("_bytes", "_MB").replace("_", " ") for name in names]
            cells = [[_cell(name, record.get(name)) for name in names] for record in records]
            result.append((title.replace("_", " "), [header, *cells]))
    return result


def _job_rows(job: dict[str, Any]) -> list[list[str]]:
    # Set on a GPU, whose memory has a measured copy and a data sheet.
    beside = {text: key for text, key in BESIDE.items() if any(mine.get(key) for mine in job["ways"].values())}
    rows = [[*COLUMNS, *beside]]
    for name, mine in job["ways"].items():
        ratios = [_or_dash(mine[key], "{:.2f}") for key in ("times_eager", "times_compile")]
        rows.append([name, *_times(mine), _or_dash(mine["of_limit"], "{:.0%}"), *ratios])
    for limit, mine in job["ceilings"].items():
        rows.append([f"limit: {limit} ({mine['way']})", *_times(mine), "100%", "", ""])
    for row, mine in zip(rows[1:], [*job["ways"].values(), *job["ceilings"].values()], strict=True):
        row += [_or_dash(mine[key], "{:.0%}") for key in beside.values()]
    for word in ("skipped", "failed"):
        for name, reason in job.get(word, {}).items():
            rows.append([f"{name}: {word}, {reason[:60]}", *[""] * (len(rows[0]) - 1)])
    return rows


def _times(mine: dict[str, Any]) -> list[str]:
    return [*(f"{mine[key]:.3f}" for key in ("p20_ms", "p50_ms", "p80_ms")), f"{mine['gb_per_s']:.1f}"]


def _or_dash(value: float | None, layout: str) -> str:
    return "-" if value is None else layout.format(value)


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if name.endswith("_bytes"):
        return f"{value / 1e6:,.1f}"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def markdown(document: dict[str, Any]) -> str:
    parts = [f"## {document['benchmark']}\n\n{machine(document['environment'])}"]
    if document["settings"]["quick"]:
        parts.append("Quick run: the figures mean nothing.")
    for title, rows in tables(document):
        header, *body = rows
        lines = [_markdown_row(header), _markdown_row(["---", *["---:"] * (len(header) - 1)])]
        parts.append("\n".join([f"### {title}\n", *lines, *(_markdown_row(row) for row in body)]))
    return "\n\n".join(parts) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def write(document: dict[str, Any], file: str | Path) -> Path:
    write_file(file, (json.dumps(document, indent=2) + "\n").encode(), overwrite=True)
    return Path(file)
