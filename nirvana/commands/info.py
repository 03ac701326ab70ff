"""nirvana info: what a plan keeps, layer by layer, drawn in the terminal."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from nirvana.commands import output
from nirvana.plan import PruningPlan

HELP = "draw kept heads and neurons per layer of a plan or of a checkpoint that nirvana wrote"
EPILOG = "examples:\n  nirvana info smaller\n  nirvana info plan.json --json\n"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("path", metavar="DIR|plan.json", help="checkpoint folder or plan file")


def run(args: Namespace) -> None:
    plan = PruningPlan.load(args.path)
    if args.json:
        widths = {
            block.name: {"unit": block.unit, "kept": len(block.kept), "size": block.size} for block in plan.blocks
        }
        output.print_json(
            {
                "architecture": plan.architecture,
                "sparsity": plan.sparsity,
                "totals": plan.totals,
                "settings": plan.settings,
                "blocks": widths,
            }
        )
        return
    print(f"{plan.architecture}, base {plan.base.get('name')}")
    for key, value in plan.settings.items():
        print(f"  {key}: {value}")
    output.print_table([["", "before", "after", "change"], *output.plan_rows(plan)])
    print()
    name = max(len(block.name) for block in plan.blocks)
    for block in plan.blocks:
        kept = len(block.kept)
        print(f"{block.name:{name}}  {block.unit:8}  {output.bar(kept, block.size)}  {kept:>6} / {block.size}")
