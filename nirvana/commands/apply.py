"""nirvana apply: checkpoint + plan file -> smaller checkpoint, one tensor in memory at a time."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from nirvana.checkpoint.convert import apply_checkpoint
from nirvana.commands import options, output
from nirvana.plan import PruningPlan

HELP = "cut a checkpoint by a plan, file to file; needs neither gradients nor the model in memory"
EPILOG = "example:\n  nirvana apply demo --plan plan.json --out smaller\n"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=options.MODEL_HELP)
    parser.add_argument("--plan", required=True, metavar="FILE", help="plan.json, or a folder that nirvana wrote")
    options.add_output(parser, "the checkpoint")
    parser.add_argument("--dtype", default="auto", metavar="TYPE", help="auto keeps the stored types")
    options.add_backend(parser)
    parser.add_argument("--max-shard-size", default="50GB", metavar="SIZE", help="largest weight file (default: 50GB)")


def run(args: Namespace) -> None:
    plan = PruningPlan.load(args.plan)
    folder = apply_checkpoint(
        args.model,
        plan,
        args.out,
        dtype=args.dtype,
        overwrite=args.overwrite,
        shard_size=args.max_shard_size,
        progress=output.progress(args.quiet or args.json),
    )
    if args.json:
        output.print_json({"checkpoint": str(folder), "sparsity": plan.sparsity, "totals": plan.totals})
        return
    output.print_table([["", "before", "after", "change"], *output.plan_rows(plan)])
    if plan.settings.get("repair"):
        print("\nthe plan comes from a run that also repaired weights; only 'nirvana prune' does that, 'apply' slices")
    print(f"\ncheckpoint: {folder}")
