"""What the command line prints: tables, bars, JSON. Progress goes to stderr, results to stdout."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tqdm import tqdm

from nirvana.plan import PruningPlan
from nirvana.progress import Progress


class Bars(Progress):
    """One tqdm bar a stage, on stderr; none where stderr is no terminal, so that logs stay readable."""

    @contextlib.contextmanager
    def stage(self, name: str, total: int, unit: str = "") -> Iterator[Callable[[int], None]]:
        with tqdm(total=total, desc=name, unit=unit or "it", unit_scale=bool(unit), disable=None) as bar:
            yield bar.update

    def note(self, line: str) -> None:
        print(line, flush=True)


def progress(quiet: bool) -> Progress:
    return Progress() if quiet else Bars()


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Rows of equal length; the first column is left-aligned, the others right-aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(others, widths[1:], strict=True))]
        print("  ".join(cells).rstrip())


def plan_rows(plan: PruningPlan) -> list[list[str]]:
    """Prunable and total parameters before and after: "50 %" means five things in five papers."""
    rows = []
    for label, key in (("prunable parameters", "prunable"), ("all parameters", "parameters")):
        before, after = plan.totals[f"{key}_before"], plan.totals[f"{key}_after"]
        rows.append([label, f"{before:,}", f"{after:,}", change(before, after)])
    return rows


def plan_line(plan: PruningPlan) -> str:
    """One line that says how near the plan came to what was asked."""
    asked = plan.settings.get("sparsity")
    line = f"removed {plan.sparsity:.3%} of the prunable parameters"
    if asked is not None and abs(plan.sparsity - asked) > 0.001:
        why = "rounding up spares units" if plan.settings.get("rounding") == "up" else "the nearest reachable count"
        line += f" (asked: {asked:.3%}; {why})"
    return line


def change(before: float, after: float) -> str:
    return f"{after / before - 1:+.1%}"


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.0f} MB"


def bar(part: int, whole: int, width: int = 24) -> str:
    filled = round(part / whole * width)
    return "█" * filled + "·" * (width - filled)
