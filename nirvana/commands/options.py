"""Options that several subcommands share."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, _ArgumentGroup
from dataclasses import fields

from nirvana.calibration.corpora import CORPUS_NAMES
from nirvana.calibration.packing import PACKINGS
from nirvana.comparison.cases import ALLOCATIONS as COMPARED_ALLOCATIONS
from nirvana.gammas import read_gamma
from nirvana.models import DTYPES
from nirvana.ops.backends import AUTO, BACKENDS
from nirvana.recipe import AUTO as SEARCHED
from nirvana.recipe import PRESETS
from nirvana.references import REFERENCES
from nirvana.repair import METHODS, RIDGE
from nirvana.saliency import CRITERION_NAMES, OBJECTIVES
from nirvana.saliency.combination import WAYS
from nirvana.widths import ALLOCATIONS, ROUNDINGS, SCOPES, WidthRule

MODEL_HELP = "Hub id, checkpoint folder, .gguf file, or 'demo' (SmolLM2-135M-Instruct)"


def add_model(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that comes with the checkpoint (default: no)"
    )
    add_placement(parser)


def add_placement(parser: ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--dtype",
        default="auto",
        metavar="TYPE",
        help=f"auto (as stored), {', '.join(DTYPES)}; also of what is written",
    )
    add_backend(parser)


def add_backend(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--backend",
        default=AUTO,
        metavar="NAME",
        help=f"kernels: {AUTO} (by device), {', '.join(BACKENDS)}; 'nirvana info' lists what is available",
    )


def add_scoring(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("scoring: which units matter")
    _add_calibration(group)
    group.add_argument(
        "--criterion",
        default="nirvana",
        metavar="NAME",
        help=f"{', '.join(CRITERION_NAMES)}, or several as a+b: the mean of their ranks (default: nirvana)",
    )
    group.add_argument(
        "--objective",
        metavar="NAME",
        help=f"{', '.join(OBJECTIVES)} (default: the criterion's own, max-logit for nirvana, else nll)",
    )
    _add_micro_batch(group)


def add_comparison(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("comparison: what is pruned, and how; each option takes several with commas")
    group.add_argument(
        "--criteria",
        type=_names,
        metavar="A,B,...",
        help=f"{', '.join(CRITERION_NAMES)}, sums as a+b (default: all of these)"
        + (f"; or references, which are no plans: {', '.join(REFERENCES)}" if REFERENCES else ""),
    )
    group.add_argument(
        "--sparsity",
        type=_numbers,
        default=[0.2, 0.5],
        metavar="P,...",
        help="fractions of the prunable parameters (attention + MLP matrices) to remove (default: .2,.5)",
    )
    group.add_argument(
        "--scope",
        type=_names,
        default=["both", "mlp"],
        metavar="KIND,...",
        help=f"{', '.join(SCOPES)}: what is pruned (default: both,mlp); the sparsity always counts both kinds",
    )
    group.add_argument(
        "--allocation",
        type=_names,
        default=list(COMPARED_ALLOCATIONS),
        metavar="RULE,...",
        help="common: the rule of 'nirvana prune' with --gamma for every criterion; published: that of each "
        f"criterion's own paper, with its repair (default: {','.join(COMPARED_ALLOCATIONS)})",
    )
    group.add_argument(
        "--repair",
        type=_names,
        default=["none"],
        metavar="METHOD,...",
        help=f"{', '.join(METHODS)}: what becomes of the kept weights (default: none)",
    )
    group.add_argument(
        "--gamma",
        type=_number,
        default=3.36,
        metavar="G",
        help="MLP pruning rate / attention pruning rate of the common rule (default: 3.36)",
    )
    group.add_argument(
        "--align",
        type=int,
        default=8,
        metavar="N",
        help="kept MLP widths are multiples of N, also by published rules (default: 8)",
    )
    group = parser.add_argument_group("scoring: which units matter")
    _add_calibration(group)
    _add_micro_batch(group)
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--text",
        action="append",
        metavar="NAME=FILE",
        help="text to evaluate on, a corpus name or NAME=FILE; may be given several times (default: novels, the "
        "built-in held-out ones)",
    )
    group.add_argument("--window", type=int, default=512, metavar="N", help="tokens per window (default: 512)")
    group.add_argument(
        "--windows", type=int, default=16, metavar="N", help="evenly spaced windows of each text (default: 16)"
    )
    group.add_argument(
        "--tasks",
        type=_names,
        default=[],
        metavar="TASK,...",
        help="multiple-choice questions, scored by lm-eval: names that it knows, such as arc_easy,piqa, fetched from "
        'the Hub, or NAME=FILE.jsonl of {"context", "choices", "label"}',
    )
    group.add_argument(
        "--limit", type=int, default=500, metavar="N", help="the first N questions of each task (default: 500)"
    )
    group.add_argument(
        "--task-dtype",
        default="auto",
        metavar="TYPE",
        help="type of the weights while questions are answered: auto (as --dtype), float32, bfloat16, float16",
    )


def _add_calibration(group: _ArgumentGroup) -> None:
    group.add_argument(
        "--calibration",
        default="novels",
        metavar="NAME|FILE",
        help=f"corpus ({', '.join(CORPUS_NAMES)}; all but novels from the Hub), hub:OWNER/NAME[/CONFIG]:SPLIT[:FIELD], "
        ".txt, .jsonl, .parquet or a folder of them, FILE#FIELD, several with + between them, or .npy of token ids "
        "[examples, tokens] (default: novels)",
    )
    group.add_argument(
        "--packing",
        default="random",
        metavar="RULE",
        help=f"{' or '.join(PACKINGS)}: a random window of each random document, or documents joined and cut in order "
        "(default: random)",
    )
    group.add_argument("--num-examples", type=int, default=32, metavar="N", help="calibration examples (default: 32)")
    group.add_argument("--seq-len", type=int, default=128, metavar="N", help="tokens per example (default: 128)")
    group.add_argument("--seed", type=int, default=0, help="seed of the calibration draw (default: 0)")


def _add_micro_batch(group: _ArgumentGroup) -> None:
    group.add_argument(
        "--micro-batch",
        type=int,
        metavar="N",
        help="examples per forward pass (default: all; mask-... and criteria without gradients take 512 tokens at a "
        "time, taylor2 one example). Same scores, fewer activations; costs nirvana, llm-pruner and afr-... an fp32 "
        "buffer as large as the prunable weights, and others nothing",
    )


def add_allocation(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("allocation: how many units go, and from where")
    group.add_argument(
        "--sparsity",
        type=_number,
        required=True,
        metavar="P",
        help="fraction of the prunable parameters (attention + MLP matrices) to remove, above 0 and below 1",
    )
    group.add_argument(
        "--gamma",
        type=_gamma,
        default=3.36,
        metavar="G|auto",
        help="MLP pruning rate / attention pruning rate (default: 3.36); for T5 also for each kind of attention: "
        "encoder=3,decoder=2,cross=1.5; auto searches the one with the smallest KL on the probe",
    )
    group.add_argument(
        "--rounding",
        default="budget",
        metavar="RULE",
        help=f"{' or '.join(ROUNDINGS)}: meet the budget, or spare neurons as published (default: budget)",
    )
    group.add_argument(
        "--align", type=int, default=8, metavar="N", help="kept MLP widths are multiples of N (default: 8)"
    )
    group.add_argument(
        "--scope",
        default="both",
        metavar="KIND",
        help=f"{', '.join(SCOPES)}: what is pruned (default: both); the sparsity always counts both kinds",
    )
    group.add_argument(
        "--allocation",
        default="global",
        metavar="RULE",
        help=f"{' or '.join(ALLOCATIONS)}: rank all layers together, or equal counts in every layer, which gives a "
        "stock checkpoint (default: global)",
    )
    group.add_argument(
        "--max-widths",
        type=int,
        metavar="N",
        help="at most N distinct pairs (KV groups, neurons) over all layers, at the same sparsity (default: no limit); "
        "8 is what torch.compile takes layer by layer",
    )
    group.add_argument(
        "--tensor-parallel",
        type=int,
        default=1,
        metavar="N",
        help="kept KV groups, heads and neurons of every layer are multiples of N devices (default: 1)",
    )


def width_rule(args: Namespace) -> WidthRule:
    """What `add_allocation` asked for; where gamma is to be searched, with the default as the first to try."""
    values = {each.name: getattr(args, each.name) for each in fields(WidthRule)}
    if args.gamma == SEARCHED:
        del values["gamma"]
    return WidthRule(**values)


def add_selection(parser: ArgumentParser, candidates: int) -> None:
    group = parser.add_argument_group("selection: which calibration batch")
    group.add_argument(
        "--candidates",
        type=int,
        default=candidates,
        metavar="N",
        help="calibration batches to choose from, by KL to the dense model on the probe; with several corpora in "
        f"--calibration (c4,wikitext2) from each in turn, and from the mixture of all (default: {candidates})",
    )
    group.add_argument(
        "--probe", metavar="NAME|FILE", help="text of the probe (default: other examples of the calibration corpora)"
    )
    group.add_argument(
        "--probe-examples", type=int, metavar="N", help="examples of the probe (default: as --num-examples)"
    )


def add_batches(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("several batches")
    group.add_argument("--batches", type=int, default=1, metavar="K", help="score K batches and combine (default: 1)")
    group.add_argument(
        "--combine",
        default="mean",
        metavar="RULE",
        help=f"{', '.join(WAYS)}: of the scores of K batches, or of their ranks (default: mean)",
    )


def add_quality(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("steps and repair")
    group.add_argument(
        "--steps",
        type=int,
        default=1,
        metavar="N",
        help="reach the sparsity in N steps, each scored on what the one before left (default: 1)",
    )
    group.add_argument(
        "--repair",
        metavar="METHOD",
        help=f"{', '.join(METHODS)}: refit the kept columns of output layers so that they take over what they can of "
        "removed units (default: least-squares, or none for criteria that read no text)",
    )
    group.add_argument(
        "--repair-ridge",
        type=_number,
        default=RIDGE,
        metavar="R",
        help=f"of the least squares, relative to the mean of their diagonal (default: {RIDGE})",
    )
    group.add_argument(
        "--repair-strength",
        type=_number_or_auto,
        default=1.0,
        metavar="S|auto",
        help="fraction of the repair to keep, 0 to 1, or auto: by KL on the probe (default: 1)",
    )
    group.add_argument(
        "--ntk", action="store_true", help="report what is kept of the neural tangent kernel (with --json)"
    )


def add_preset(parser: ArgumentParser) -> None:
    settings = {name: " ".join(f"--{k} {v}" for k, v in preset.items()) for name, preset in PRESETS.items()}
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help="; ".join(f"{name}: {line}" for name, line in settings.items()) + "; what else is given wins",
    )


def add_output(parser: ArgumentParser, what: str) -> None:
    parser.add_argument("--out", required=True, metavar="PATH", help=f"where {what} goes")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier run left at PATH")


def add_evaluation(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("evaluation")
    group.add_argument("--text", metavar="NAME|FILE", help="text to evaluate on (default: built-in held-out novels)")
    group.add_argument("--window", type=int, default=512, metavar="N", help="tokens per window (default: 512)")
    group.add_argument("--stride", type=int, metavar="N", help="tokens by which windows move on (default: the window)")
    group.add_argument(
        "--max-windows", type=int, default=16, metavar="N", help="evenly spaced windows to use (default: 16)"
    )
    group.add_argument("--prompt", metavar="TEXT", help="text to continue greedily")


def _number(text: str) -> float:
    return float(text)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> list[float]:
    return [float(part) for part in _names(text)]


def _number_or_auto(text: str) -> float | str:
    return text if text == SEARCHED else float(text)


def _gamma(text: str) -> float | str | dict[str, float]:
    return text if text == SEARCHED else read_gamma(text)


_gamma.__name__ = f"number or {SEARCHED!r}"
_number_or_auto.__name__ = f"number or {SEARCHED!r}"
_numbers.__name__ = "numbers with commas"
_number.__name__ = "number"  # argparse names the type in its error message
