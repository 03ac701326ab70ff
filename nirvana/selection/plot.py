"""The picture of a selection: KL and perplexity of all candidates, and the curve over gamma."""

from __future__ import annotations

import io
from typing import Any

BEST, OTHERS, LINE = "#2a7f62", "#b8bec4", "#c2452d"


def draw(report: dict[str, Any]) -> bytes | None:
    """Draw a PNG.

    Args:
        report: `Selection.to_dict` and, as "gamma", `GammaSearch.to_dict`.

    Returns:
        The file's bytes; None where matplotlib is not installed.
    """
    try:
        # The object interface: no display and no global state are touched.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    curve = [point for point in report["gamma"]["curve"] if "kl" in point]
    panels = 3 if curve else 2
    figure = Figure(figsize=(4.5 * panels, 0.3 * len(report["candidates"]) + 1.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels)
    names = [f"{one['index']}: {one['source']}" for one in report["candidates"]]
    colours = [BEST if one["index"] == report["best"] else OTHERS for one in report["candidates"]]
    for axis, key, label in zip(
        axes[:2], ("kl", "perplexity"), ("KL to the dense model, nats/token", "perplexity"), strict=True
    ):
        values = [one[key] for one in report["candidates"]]
        bars = axis.barh(range(len(values)), values, color=colours)
        axis.bar_label(bars, fmt="%.4g", padding=2, fontsize=7)
        axis.axvline(sum(values) / len(values), color=LINE, linewidth=1, label="mean of the candidates")
        axis.set_yticks(range(len(values)), names if key == "kl" else [])
        axis.invert_yaxis()
        axis.set_xlabel(f"{label}, on the probe")
        axis.margins(x=0.15)
    axes[1].axvline(report["dense_perplexity"], color="black", linestyle="--", linewidth=1, label="dense model")
    figure.legend(*axes[1].get_legend_handles_labels(), loc="outside upper left", ncols=2, fontsize=7, frameon=False)
    if curve:
        axes[2].plot([point["gamma"] for point in curve], [point["kl"] for point in curve], "o-", color=OTHERS)
        chosen = next(point for point in curve if point["gamma"] == report["gamma"]["gamma"])
        axes[2].plot(chosen["gamma"], chosen["kl"], "o", color=BEST)
        axes[2].set_xscale("log")
        axes[2].set_xlabel("gamma")
        axes[2].set_ylabel("KL to the dense model, nats/token")
    for axis in axes:
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, dpi=120, format="png")
    return file.getvalue()
