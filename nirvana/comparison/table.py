"""The rows of a comparison as a table: for a terminal and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Rows = Sequence[Mapping[str, Any]]


def groups(rows: Rows) -> dict[tuple[float, str], list[Mapping[str, Any]]]:
    """(sparsity, scope) -> its rows, those nearest to the dense model first, impossible ones last."""
    found: dict[tuple[float, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["sparsity"], row["scope"]), []).append(row)
    return {key: sorted(found[key], key=mean_kl) for key in sorted(found)}


def mean_kl(row: Mapping[str, Any]) -> float:
    """Over the texts, nats per token; infinite for an impossible row."""
    kls = [text["kl"] for text in row.get("texts", {}).values()]
    return math.inf if "impossible" in row or not kls else sum(kls) / len(kls)


def label(row: Mapping[str, Any]) -> str:
    """Criterion, rule and repair in words, for a plot."""
    parts = [row["criterion"]]
    parts += [row["allocation"]] if row["allocation"] != "reference" else []
    parts += [row["repair"]] if row["repair"] != "none" else []
    return ", ".join(parts)


def cells(document: Mapping[str, Any], rows: Rows) -> list[list[str]]:
    """Head and one line a row: for rows of one sparsity and scope."""
    texts, tasks = list(document["dense"].get("texts", {})), list(document["dense"].get("tasks", {}))
    head = ["criterion", "allocation", "repair", "kept", "off by", *(f"ppl {name}" for name in texts), "KL"]
    head += [*(f"{name} acc/norm" for name in tasks), "scoring", "peak", "note"]
    return [head] + [_line(document, row, texts, tasks) for row in rows]


def dense_cells(document: Mapping[str, Any]) -> str:
    """The dense model in one line."""
    dense = document["dense"]
    texts = [f"perplexity {name} {_perplexity(text)}" for name, text in dense.get("texts", {}).items()]
    tasks = [f"{name} {_accuracy(task)}" for name, task in dense.get("tasks", {}).items()]
    size = f"{dense['parameters']:,} parameters, {dense['prunable']:,} of them prunable"
    return f"dense: {size}; " + ", ".join([*texts, *tasks])


def notes(document: Mapping[str, Any]) -> list[str]:
    """What a reader must know of the columns."""
    about = document["about"]
    texts = ", ".join(
        f"{name} ({text['source']}, {' x '.join(map(str, text['shape']))} tokens)"
        for name, text in about["texts"].items()
    )
    unread = [name for name, figures in document["scoring"].items() if not figures["reads_calibration"]]
    lines = [
        f"model: {about['model']}; calibration: {about['calibration']['source']}, the same tokens for all",
        f"texts: {texts}",
        "kept: all parameters that stay; off by: kept beyond the common target; KL: to the dense model, nats a token, "
        "mean of the texts",
        "scoring: time of the scoring pass (of pruning, for references); peak: how much the memory of this process "
        "grew in it (on CUDA: what was allocated)",
    ]
    tasks = about.get("tasks", {})
    if tasks:
        asked = ", ".join(_asked(name, task) for name, task in tasks.items())
        lines.insert(2, f"tasks: {asked}; % right, and with log-likelihoods divided by the length of the answer")
    shared = dict.fromkeys(
        tuple(figures["together"]) for figures in document["scoring"].values() if "together" in figures
    )
    lines += [f"scored together, all in that time: {', '.join(names)}" for names in shared]
    return lines + ([f"read no calibration text: {', '.join(unread)}"] if unread else [])


def markdown(document: Mapping[str, Any]) -> str:
    """All rows of a comparison."""
    lines = ["# Comparison", "", dense_cells(document), ""]
    for (sparsity, scope), rows in groups(document["rows"]).items():
        head, *body = cells(document, rows)
        lines += [f"## {title(sparsity, scope)}", ""]
        lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in body] + [""]
    return "\n".join([*lines, *(f"* {note}" for note in notes(document))]) + "\n"


def title(sparsity: float, scope: str) -> str:
    return f"{sparsity:.3g} of the prunable parameters removed, scope {scope}"


def _line(document: Mapping[str, Any], row: Mapping[str, Any], texts: list[str], tasks: list[str]) -> list[str]:
    names = [row["criterion"], row["allocation"], row["repair"]]
    if "impossible" in row:
        return [*names, *["-"] * (5 + len(texts) + len(tasks)), f"impossible: {row['impossible']}"]
    cost = document["scoring"].get(row["criterion"], {})
    seconds = row.get("pruning_seconds", cost.get("seconds"))
    peak = row.get("pruning_peak_bytes", cost.get("peak_bytes"))
    return [
        *names,
        f"{row['parameters']:,}",
        f"{row['difference']:+,}",
        *(_perplexity(row["texts"].get(name)) for name in texts),
        f"{mean_kl(row):.3f}",
        *(_accuracy(row.get("tasks", {}).get(name)) for name in tasks),
        "-" if seconds is None else f"{seconds:.1f} s",
        "-" if peak is None else f"{peak / 1e6:,.0f} MB",
        row["note"],
    ]


def _asked(name: str, task: Mapping[str, Any]) -> str:
    kind = task.get("dtype", "auto")
    return f"{name} ({task['source']}, {task['questions']} questions{'' if kind == 'auto' else f' in {kind}'})"


def _perplexity(text: Mapping[str, Any] | None) -> str:
    if text is None:
        return "-"
    value = text["perplexity"]
    return "inf" if value is None else f"{value:.1f}" if value < 1e4 else f"{value:.1e}"


def _accuracy(task: Mapping[str, Any] | None) -> str:
    if task is None:
        return "-"
    return "/".join(f"{100 * task[name]:.1f}" for name in ("acc", "acc_norm") if task.get(name) is not None)
