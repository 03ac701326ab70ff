"""Options that several subcommands share."""

from __future__ import annotations

from argparse import ArgumentParser

from nirvana.calibration.corpora import BUILT_IN
from nirvana.models import DTYPES
from nirvana.ops.backends import AUTO, BACKENDS
from nirvana.saliency import CRITERION_NAMES, OBJECTIVES
from nirvana.widths import ALLOCATIONS, ROUNDINGS, SCOPES

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
    group.add_argument(
        "--calibration",
        default="novels",
        metavar="NAME|FILE",
        help=f"corpus ({', '.join(BUILT_IN)}), or .txt, .jsonl, .parquet, folder of .txt, or .npy of token ids "
        "[examples, tokens] (default: novels)",
    )
    group.add_argument("--num-examples", type=int, default=32, metavar="N", help="calibration examples (default: 32)")
    group.add_argument("--seq-len", type=int, default=128, metavar="N", help="tokens per example (default: 128)")
    group.add_argument("--seed", type=int, default=0, help="seed of the calibration draw (default: 0)")
    group.add_argument(
        "--criterion", default="nirvana", metavar="NAME", help=f"{', '.join(CRITERION_NAMES)} (default: nirvana)"
    )
    group.add_argument(
        "--objective", default="max-logit", metavar="NAME", help=f"{', '.join(OBJECTIVES)} (default: max-logit)"
    )
    group.add_argument(
        "--micro-batch",
        type=int,
        metavar="N",
        help="examples per forward pass (default: all). Same scores, fewer activations; costs an fp32 buffer as large "
        "as the prunable weights",
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
        type=_number,
        default=3.36,
        metavar="G",
        help="MLP pruning rate / attention pruning rate (default: 3.36)",
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


_number.__name__ = "number"  # argparse names the type in its error message
