"""Bar charts of results: GB/s of each way, and the limit as a line.

python -m nirvana.benchmarks.plots FILE.json ... [--out DIR]
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

from nirvana.benchmarks import report
from nirvana.checkpoint.atomic import write_file
from nirvana.errors import NirvanaError

OURS, OTHERS, LIMIT = "#2a7f62", "#b8bec4", "#c2452d"


def plot(document: dict[str, Any], folder: str | Path) -> Path | None:
    """Draw all jobs of a document into ``folder/NAME.png``; None where it has no jobs.

    Raises:
        NirvanaError: matplotlib is not installed.
    """
    try:
        # The object interface: no display and no global state are touched.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise NirvanaError("plots need matplotlib: pip install nirvana[bench]") from None
    jobs = document["jobs"]
    if not jobs:
        return None
    heights = [len(job["ways"]) + 2 for job in jobs]
    figure = Figure(figsize=(9, 0.28 * sum(heights) + 1), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(jobs), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, job in zip(axes, jobs, strict=True):
        _draw(axis, job)
    axes[-1].set_xlabel("GB/s of the bytes that must be moved, median")
    figure.suptitle(report.machine(document["environment"]), fontsize=9)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    file = Path(folder) / f"{document['benchmark']}.png"
    write_file(file, picture.getvalue(), overwrite=True)
    return file


def _draw(axis: Any, job: dict[str, Any]) -> None:
    names = list(job["ways"])[::-1]
    speeds = [job["ways"][name]["gb_per_s"] for name in names]
    bars = axis.barh(names, speeds, color=[OURS if name.startswith("nirvana") else OTHERS for name in names])
    axis.bar_label(bars, fmt="%.3g", padding=2, fontsize=7)
    for style, (limit, mine) in zip(("-", "--"), job["ceilings"].items(), strict=False):
        axis.axvline(mine["gb_per_s"], color=LIMIT, linestyle=style, linewidth=1, label=limit)
    if job["ceilings"]:
        axis.legend(fontsize=7, loc="lower right", frameon=False)
    axis.set_title(job["job"], fontsize=8, loc="left")
    axis.tick_params(labelsize=7)
    axis.margins(x=0.12)
    axis.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE.json")
    parser.add_argument("--out", metavar="DIR", help="default: beside the first file")
    args = parser.parse_args()
    for file in args.files:
        drawn = plot(json.loads(Path(file).read_text()), args.out or Path(file).parent)
        print(drawn or f"{file} holds nothing to draw")


if __name__ == "__main__":
    main()
