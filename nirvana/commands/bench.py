"""nirvana bench: the kernels side by side with eager PyTorch, torch.compile and the limits of the machine."""

from __future__ import annotations

import importlib.util
from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch

from nirvana.commands import output
from nirvana.errors import NirvanaError
from nirvana.models import resolve

#: Subcommand -> what it measures; modules of nirvana.benchmarks.
BENCHMARKS = {
    "saliency": "scores of rows and columns, error against float64, a whole small model in one call",
    "slice": "cutting kept rows and columns out of a weight",
    "kl": "KL divergence of logits, time and memory",
    "mixture": "Gaussian mixtures of score vectors, against scikit-learn on a sample of them",
    "prune": "the whole job on the demo model against the published way, time and memory",
    "selection": "one candidate of a selection against the published way, time and memory",
}
QUICK_ROUNDS = 2

HELP = "time the kernels against eager PyTorch, torch.compile and the limits of this machine"
EPILOG = (
    "benchmarks:\n"
    + "".join(f"  {name:11}{text}\n" for name, text in BENCHMARKS.items())
    + "\nEvery way is checked before it is timed; ways take turns. Close other programs first.\n\n"
    "examples:\n"
    "  nirvana bench saliency\n"
    "  nirvana bench all --out results --plots\n"
)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "benchmark",
        nargs="?",
        default="all",
        metavar="NAME",
        help=f"{', '.join(BENCHMARKS)} or all (default: all)",
    )
    parser.add_argument("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda, cuda:1, ...")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="timed calls of each way (default: 20)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that everything runs")
    parser.add_argument("--out", metavar="DIR", help="write NAME.json of each benchmark there")
    parser.add_argument("--plots", action="store_true", help="write NAME.png beside them (needs matplotlib and --out)")


def run(args: Namespace) -> None:
    if args.benchmark != "all" and args.benchmark not in BENCHMARKS:
        raise NirvanaError(f"benchmark {args.benchmark!r} must be one of {', '.join(BENCHMARKS)}, all")
    if args.rounds < 2:
        raise NirvanaError(f"--rounds {args.rounds} must be at least 2")
    if args.threads is not None and args.threads < 1:
        raise NirvanaError(f"--threads {args.threads} must be at least 1")
    if args.plots and not args.out:
        raise NirvanaError("--plots needs --out DIR, where the pictures go")
    if args.out and Path(args.out).exists() and not Path(args.out).is_dir():
        raise NirvanaError(f"--out {args.out} is not a folder")
    # Loaded here only: other subcommands need none of this.
    from nirvana.benchmarks import harness, report

    device = harness.find_device(args.device)
    settings = harness.Settings(device, QUICK_ROUNDS if args.quick else args.rounds, args.quick)
    names = list(BENCHMARKS) if args.benchmark == "all" else [args.benchmark]
    # What is missing is said now, and not after minutes of measuring.
    if args.plots and importlib.util.find_spec("matplotlib") is None:
        raise NirvanaError("--plots needs matplotlib: pip install nirvana[bench]")
    if {"prune", "selection"} & set(names) and not args.quick:
        resolve("demo")
    threads = torch.get_num_threads()
    if args.threads:
        torch.set_num_threads(args.threads)
    documents = {}
    try:
        for name in names:
            document = importlib.import_module(f"nirvana.benchmarks.{name}").run(settings)
            documents[name] = document
            if not args.json:
                report.show(document)
                print()
            if args.out:
                _keep(document, Path(args.out), args)
    finally:
        torch.set_num_threads(threads)
    if args.json:
        output.print_json(documents)


def _keep(document: dict, folder: Path, args: Namespace) -> None:
    from nirvana.benchmarks import report

    files = [report.write(document, folder / f"{document['benchmark']}.json")]
    if args.plots:
        from nirvana.benchmarks import plots

        files.append(plots.plot(document, folder))
    if not args.json:
        print(*(file for file in files if file), "", sep="\n")
