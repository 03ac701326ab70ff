"""The picture of a comparison: KL to the dense model, one panel for each sparsity and scope."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from nirvana.comparison.table import groups, label, mean_kl

COLOURS = {"common": "#2a7f62", "published": "#4a6fa5", "reference": "#b8bec4"}


def draw(document: Mapping[str, Any]) -> bytes | None:
    """Draw a PNG.

    Returns:
        The file's bytes; None where matplotlib is not installed, or no row is possible.
    """
    try:
        # The object interface: no display and no global state are touched.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        return None
    panels = {key: [row for row in rows if "impossible" not in row] for key, rows in groups(document["rows"]).items()}
    panels = {key: rows for key, rows in panels.items() if rows}
    if not panels:
        return None
    height = 0.24 * max(len(rows) for rows in panels.values()) + 1.4
    figure = Figure(figsize=(4.6 * len(panels), height), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, ((sparsity, scope), rows) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):  # noqa: B905
        bars = axis.barh(
            range(len(rows)), [mean_kl(row) for row in rows], color=[COLOURS[row["allocation"]] for row in rows]
        )
        axis.bar_label(bars, fmt="%.3g", padding=2, fontsize=7)
        axis.set_yticks(range(len(rows)), [label(row) for row in rows])
        axis.invert_yaxis()
        axis.set_title(f"{sparsity:.3g} removed, scope {scope}", fontsize=9)
        axis.set_xlabel("KL to the dense model, nats/token", fontsize=8)
        axis.margins(x=0.15)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    kinds = [kind for kind in COLOURS if any(row["allocation"] == kind for rows in panels.values() for row in rows)]
    handles = [Patch(color=COLOURS[kind], label=kind) for kind in kinds]
    figure.legend(handles=handles, loc="outside upper left", ncols=3, fontsize=7, frameon=False)
    file = io.BytesIO()
    figure.savefig(file, dpi=120, format="png")
    return file.getvalue()
