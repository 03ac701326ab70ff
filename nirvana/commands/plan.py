"""nirvana plan: model shapes + saliency file -> plan file."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from nirvana.allocation import allocate
from nirvana.checkpoint.atomic import check_target
from nirvana.commands import options, output
from nirvana.models import resolve
from nirvana.retention import kept_saliency_line
from nirvana.saliency import Saliency

HELP = "choose which units stay; writes plan.json. Reads no weights, only MODEL's configuration"
EPILOG = "example:\n  nirvana plan demo --saliency saliency.safetensors --sparsity 0.5 --out plan.json\n"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=options.MODEL_HELP)
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")
    parser.add_argument("--saliency", required=True, metavar="FILE", help="what 'nirvana score' wrote")
    options.add_output(parser, "the plan")
    options.add_allocation(parser)


def run(args: Namespace) -> None:
    check_target(args.out, args.overwrite)
    plan = allocate(
        Saliency.load(args.saliency),
        resolve(args.model, args.trust_remote_code).architecture(),
        sparsity=args.sparsity,
        gamma=args.gamma,
        rounding=args.rounding,
        align=args.align,
        scope=args.scope,
        allocation=args.allocation,
        max_widths=args.max_widths,
        tensor_parallel=args.tensor_parallel,
    )
    plan.save(args.out, overwrite=args.overwrite)
    if args.json:
        kept = plan.settings["kept_saliency"]
        report = {"plan": str(args.out), "sparsity": plan.sparsity, "kept_saliency": kept, "totals": plan.totals}
        output.print_json(report)
        return
    output.print_table([["", "before", "after", "change"], *output.plan_rows(plan)])
    print(f"\n{output.plan_line(plan)}")
    if line := kept_saliency_line(plan.settings):
        print(line)
    print(f"plan: {args.out}")
