"""nirvana prune: the whole way from a model to a smaller checkpoint."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from typing import Any

from nirvana.commands import eval as evaluation
from nirvana.commands import options, output
from nirvana.evaluation.compare import check_evaluation
from nirvana.pruning import prune
from nirvana.recipe import preset

HELP = "make a smaller model: score, plan, slice, write a checkpoint"
EPILOG = """\
examples:
  nirvana prune demo --sparsity 0.2 --out smaller --evaluate
  nirvana prune meta-llama/Llama-3.1-8B --sparsity 0.5 --out llama-pruned --dtype bfloat16
  nirvana prune demo --sparsity 0.4 --preset best --calibration my.jsonl --num-examples 96 --out better
  nirvana prune ./my-qwen --sparsity 0.3 --allocation uniform --out stock     # opens everywhere, nothing to install
"""


def add_arguments(parser: ArgumentParser) -> None:
    options.add_model(parser)
    options.add_output(parser, "the checkpoint")
    options.add_allocation(parser)
    options.add_scoring(parser)
    options.add_batches(parser)
    options.add_selection(parser, candidates=1)
    options.add_quality(parser)
    options.add_preset(parser)
    parser.add_argument("--evaluate", action="store_true", help="evaluate the dense and the pruned model afterwards")
    options.add_evaluation(parser)


def run(args: Namespace) -> None:
    if args.preset is not None:
        preset(args.preset)
    if args.evaluate:
        check_evaluation(args.text, args.window, args.stride, args.max_windows)
    result = prune(
        args.model,
        args.sparsity,
        out=args.out,
        progress=output.progress(args.quiet or args.json),
        **{name: getattr(args, name) for name in PRUNE_OPTIONS},
    )
    plan = result.plan
    report = {
        "checkpoint": str(result.checkpoint),
        "sparsity": plan.sparsity,
        "kept_saliency": plan.settings["kept_saliency"],
        "totals": plan.totals,
        **{name: plan.settings[name] for name in FOUND if name in plan.settings},
    }
    if result.ntk is not None:
        report["ntk"] = result.ntk
    if args.evaluate:
        report["evaluation"] = evaluation.run_evaluation(args, str(result.checkpoint), args.model)
    if args.json:
        output.print_json(report)
        return
    rows = [["", "before", "after", "change"], *output.plan_rows(plan)]
    if args.evaluate:
        rows += evaluation.comparison_rows(report["evaluation"])
    output.print_table(rows)
    print(f"\n{output.plan_line(plan)}")
    for line in found_lines(plan.settings):
        print(line)
    if args.evaluate:
        evaluation.print_notes(report["evaluation"])
    print(f"checkpoint: {result.checkpoint}\nplan:       {result.checkpoint}/nirvana_plan.json")


def found_lines(settings: Mapping[str, Any]) -> list[str]:
    """What the run has searched, chosen and repaired, in words."""
    lines = []
    if chosen := settings.get("selection"):
        kls = [candidate["kl"] for candidate in chosen["candidates"]]
        mean = sum(kls) / len(kls)
        lines.append(f"calibration: candidate {chosen['best']} of {len(kls)}, KL {min(kls):.4f} (mean {mean:.4f})")
    if curve := settings.get("gamma_search"):
        lines.append(f"gamma: {settings['gamma']:g}, the best of {sum(p.get('probed', False) for p in curve)} plans")
    if done := settings.get("repair"):
        strength = done["strength"]
        if isinstance(strength, dict):
            strength = f"{strength['attention']:g} in attention, {strength['mlp']:g} in MLPs"
        lines.append(f"repair: {done['method']}, strength {strength}")
    return lines


#: Settings of the plan that the run has found out.
FOUND = ("gamma", "selection", "gamma_search", "steps", "repair")

#: Options that go to `nirvana.prune` under their own names.
PRUNE_OPTIONS = (
    "calibration",
    "num_examples",
    "seq_len",
    "packing",
    "seed",
    "batches",
    "combine",
    "candidates",
    "probe",
    "probe_examples",
    "criterion",
    "objective",
    "micro_batch",
    "gamma",
    "rounding",
    "align",
    "scope",
    "allocation",
    "max_widths",
    "tensor_parallel",
    "steps",
    "repair",
    "repair_ridge",
    "repair_strength",
    "ntk",
    "dtype",
    "device",
    "overwrite",
    "trust_remote_code",
)
