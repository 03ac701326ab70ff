"""nirvana eval: perplexity, KL to a reference, generation, latency, memory."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from nirvana.commands import options, output
from nirvana.evaluation.compare import evaluate
from nirvana.evaluation.generation import PROMPT

HELP = "perplexity, KL to the dense model, generation, latency and memory"
EPILOG = """\
examples:
  nirvana eval smaller --reference demo
  nirvana eval smaller --text wiki.test.raw.txt --window 1024 --json
"""


def add_arguments(parser: ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument("--reference", metavar="MODEL", help="the dense model, for KL and side-by-side figures")
    options.add_evaluation(parser)


def run(args: Namespace) -> None:
    result = run_evaluation(args, args.model, args.reference)
    if args.json:
        output.print_json(result)
        return
    if result["reference"] is not None:
        rows = [["", "reference", "model", "change"]]
        for label, key in (("prunable parameters", "prunable_parameters"), ("all parameters", "parameters")):
            before, after = result["reference"][key], result["model"][key]
            rows.append([label, f"{before:,}", f"{after:,}", output.change(before, after)])
        output.print_table(rows + comparison_rows(result))
    else:
        model = result["model"]
        output.print_table([["", "model"], *([label, shown] for label, shown in _figures(model))])
    print()
    print_notes(result)


def run_evaluation(args: Namespace, model: str, reference: str | None) -> dict[str, Any]:
    return evaluate(
        model,
        reference=reference,
        text=args.text,
        window=args.window,
        stride=args.stride,
        max_windows=args.max_windows,
        prompt=args.prompt or PROMPT,
        dtype=args.dtype,
        device=args.device,
        trust_remote_code=args.trust_remote_code,
        progress=output.progress(args.quiet or args.json),
    )


def comparison_rows(result: dict[str, Any]) -> list[list[str]]:
    """Reference, model and change for every figure that both have."""
    before, after = result["reference"], result["model"]
    rows = [
        [label, old, new, output.change(before[key], after[key])]
        for (key, (label, old)), (_, new) in zip(_keyed(before), _figures(after), strict=True)
    ]
    rows.insert(1, ["KL to the dense model (nats/token)", "0", f"{after['kl']:.4f}", ""])
    return rows


def print_notes(result: dict[str, Any]) -> None:
    text = result["text"]
    print(
        f"text: {text['source']}, {text['windows']} windows of {text['window']} tokens, stride {text['stride']}, "
        f"{text['tokens']} predicted tokens; latency: forward pass over 1 x 128 tokens, median of 11; "
        "memory: peak of a fresh process that runs it"
    )
    for label in ("reference", "model"):
        if result[label] is not None:
            print(f"{label} says: {result[label]['generated']!r}")


def _keyed(model: dict[str, Any]) -> list[tuple[str, tuple[str, str]]]:
    return list(zip(("perplexity", "forward_seconds", "peak_memory_bytes"), _figures(model), strict=True))


def _figures(model: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("perplexity", f"{model['perplexity']:.2f}"),
        ("forward latency", f"{model['forward_seconds'] * 1000:.1f} ms"),
        ("peak memory", output.megabytes(model["peak_memory_bytes"])),
    ]
