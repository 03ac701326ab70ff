"""nirvana info: what a plan keeps, layer by layer, drawn in the terminal; without a plan, what this machine offers."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

import torch
import transformers

import nirvana
from nirvana.commands import output
from nirvana.ops.backends import BACKENDS, status
from nirvana.plan import PruningPlan

HELP = "versions and kernel backends of this machine; or kept heads and neurons per layer of a plan or checkpoint"
EPILOG = "examples:\n  nirvana info\n  nirvana info smaller\n  nirvana info plan.json --json\n"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "path", nargs="?", metavar="DIR|plan.json", help="checkpoint folder or plan file (default: this machine)"
    )


def run(args: Namespace) -> None:
    if args.path is None:
        _print_machine(args.json)
    else:
        _print_plan(args)


def _print_machine(as_json: bool) -> None:
    versions = {"nirvana": nirvana.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU that torch can use"
    backends = status()
    if as_json:
        output.print_json(
            {"versions": versions, "threads": torch.get_num_threads(), "gpu": device, "backends": backends}
        )
        return
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    print(f"{torch.get_num_threads()} threads, {device}")
    for name, reason in backends.items():
        print(f"  {name:7} {BACKENDS[name].text:24} {reason or 'available'}")


def _print_plan(args: Namespace) -> None:
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
