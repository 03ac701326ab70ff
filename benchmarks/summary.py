"""The results of one call of `gpu`: one JSON file, one Markdown file, and a table to be read at the end."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from nirvana.benchmarks import report, runner
from nirvana.benchmarks.runner import Result

FORMAT, VERSION = "nirvana-gpu", 1
#: Of a printed line: 60 of them are 10,800 characters.
WIDTH = 180
#: Names of the limits that are a copy, of the job's own size.
COPIES = ("copy", "copy to existing memory")


class Summary:
    """Results as they come. The files always hold all of them: the call may be killed at any time."""

    def __init__(self, call: str, folder: Path):
        self.results: list[Result] = []
        self.seconds = 0.0
        self._call, self._folder = call, folder
        self._written: list[Path] = []

    def add(self, result: Result) -> None:
        self.results.append(result)
        copy, peak = self._figure("ceilings", "copy_tb_per_s"), self._about().get("gpu_peak_tb_per_s")
        for job in (result.document or {}).get("jobs", []):
            _set_beside(job, copy, peak)
        self.write()

    @property
    def json_file(self) -> Path:
        return self._folder / f"{self._stem}.json"

    @property
    def markdown_file(self) -> Path:
        return self._folder / f"{self._stem}.md"

    @property
    def failed(self) -> bool:
        return any(result.failed for result in self.results)

    def write(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        whole = {"format": FORMAT, "version": VERSION, "call": self._call, "seconds": self.seconds}
        whole["machine"] = self._about()
        whole["stages"] = {
            r.name: {"outcome": r.outcome, "seconds": r.seconds, "document": r.document, "log": r.log}
            for r in self.results
        }
        files = [self.json_file, self.markdown_file]
        runner.replace(files[0], json.dumps(whole, indent=1) + "\n")
        runner.replace(files[1], self._markdown())
        # Named before a stage had told what machine this is.
        for file in {*self._written} - {*files}:
            file.unlink(missing_ok=True)
        self._written = files

    def table(self, lines: int) -> list[str]:
        """Every stage, its outcome and its seconds, and as many key figures below as there are lines for."""
        figures = [headlines(result.document) for result in self.results]
        spare = max(0, lines - 3 - len(self.results))
        # None of a stage before all of another.
        most = next(n for n in range(spare, -1, -1) if sum(min(n, len(mine)) for mine in figures) <= spare)
        # The stages of a quick pass have that in their names.
        plain = [r.document for r in self.results if r.document and not r.name.startswith("quick ")]
        quick = any(document.get("settings", {}).get("quick") for document in plain)
        note = "; small shapes: the figures mean nothing" if quick else ""
        table = [f"gpu {self._call}: {self._machine()}, {self.seconds:.0f} s{note}"[:WIDTH]]
        for result, mine in zip(self.results, figures, strict=True):
            table.append(f"{result.name:19} {result.seconds:5.1f} s  {result.outcome}"[:WIDTH])
            table += [f"    {figure}"[:WIDTH] for figure in mine[:most]]
        return [*table, str(self.json_file), str(self.markdown_file)]

    @property
    def _stem(self) -> str:
        about = self._about()
        name = about.get("gpu") or about.get("cpu") or "unknown"
        return f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}-{self._call}"

    def _about(self) -> dict[str, Any]:
        """By the latest that says it: the native modules may have been built since the first."""
        documents = [about for r in self.results if (about := (r.document or {}).get("environment"))]
        return documents[-1] if documents else {}

    def _machine(self) -> str:
        return report.machine(self._about()) if self._about() else "unknown machine"

    def _figure(self, stage: str, key: str) -> Any:
        documents = (result.document for result in self.results if result.name == stage)
        return next((document.get(key) for document in documents if document), None)

    def _markdown(self) -> str:
        lines = [f"# {self._call}: {self._machine()}\n", "| stage | outcome | seconds |", "| --- | --- | ---: |"]
        lines += [f"| {r.name} | {r.outcome.replace('|', '/')} | {r.seconds:.1f} |" for r in self.results]
        documents = [result.document for result in self.results if result.document]
        return "\n".join([*lines, "", *(report.markdown(document) for document in documents)])


def headlines(document: dict[str, Any] | None) -> list[str]:
    """What a stage says of itself, or a line for each of its jobs."""
    if document is None:
        return []
    return document.get("headlines") or [line for job in document["jobs"] for line in _job_lines(job)]


def _job_lines(job: dict[str, Any]) -> list[str]:
    """The kernels' ways, two a line; of loops and of calls without allocation the files tell."""
    ways = [
        f"{name.removeprefix('nirvana, ')} {_way_text(mine)}"
        for name, mine in job["ways"].items()
        if name.startswith("nirvana")
        and not name.startswith("nirvana, torch")
        and not name.endswith(("alone", "a call each"))
    ]
    title = job["job"].removeprefix("group_saliency ").removeprefix("gather_slice ")
    return [f"{title}: {'; '.join(ways[i : i + 2])}" for i in range(0, len(ways), 2)] or [f"{title}: no kernel here"]


def _way_text(mine: dict[str, Any]) -> str:
    beside = [f"{mine[key]:.0%} {text}" for text, key in (("copy", "of_copy"), ("peak", "of_peak")) if mine.get(key)]
    ratios = [f"x{mine[f'times_{text}']:.2f} {text}" for text in ("eager", "compile") if mine[f"times_{text}"]]
    return " ".join([f"{mine['gb_per_s'] / 1e3:.3g} TB/s", *([f"({', '.join(beside)})"] if beside else []), *ratios])


def _set_beside(job: dict[str, Any], copy: float | None, peak: float | None) -> None:
    """Every row beside the measured copy and the data sheet's peak. A copy of the job's own size goes before the
    device's, which is one of 1 GiB."""
    own = [job["ceilings"][name]["gb_per_s"] / 1e3 for name in COPIES if name in job["ceilings"]]
    copy = own[0] if own else copy
    for mine in [*job["ways"].values(), *job["ceilings"].values()]:
        speed = mine["gb_per_s"] / 1e3
        mine["of_copy"] = speed / copy if copy else None
        mine["of_peak"] = speed / peak if peak else None
