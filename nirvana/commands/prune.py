"""nirvana prune: the whole way from a model to a smaller checkpoint."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from nirvana.commands import eval as evaluation
from nirvana.commands import options, output
from nirvana.evaluation.compare import check_evaluation
from nirvana.pruning import prune

HELP = "make a smaller model: score, plan, slice, write a checkpoint"
EPILOG = """\
examples:
  nirvana prune demo --sparsity 0.2 --out smaller --evaluate
  nirvana prune meta-llama/Llama-3.1-8B --sparsity 0.5 --out llama-pruned --dtype bfloat16
  nirvana prune ./my-qwen --sparsity 0.3 --allocation uniform --out stock     # opens everywhere, nothing to install
"""


def add_arguments(parser: ArgumentParser) -> None:
    options.add_model(parser)
    options.add_output(parser, "the checkpoint")
    options.add_allocation(parser)
    options.add_scoring(parser)
    parser.add_argument("--evaluate", action="store_true", help="evaluate the dense and the pruned model afterwards")
    options.add_evaluation(parser)


def run(args: Namespace) -> None:
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
    }
    if args.evaluate:
        try:
            report["evaluation"] = evaluation.run_evaluation(args, str(result.checkpoint), args.model)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"not evaluated, but the checkpoint {result.checkpoint} is complete") from None
    if args.json:
        output.print_json(report)
        return
    rows = [["", "before", "after", "change"], *output.plan_rows(plan)]
    if args.evaluate:
        rows += evaluation.comparison_rows(report["evaluation"])
    output.print_table(rows)
    print(f"\n{output.plan_line(plan)}")
    if args.evaluate:
        evaluation.print_notes(report["evaluation"])
    print(f"checkpoint: {result.checkpoint}\nplan:       {result.checkpoint}/nirvana_plan.json")


#: Options that go to `nirvana.prune` under their own names.
PRUNE_OPTIONS = (
    "calibration",
    "num_examples",
    "seq_len",
    "seed",
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
    "dtype",
    "device",
    "overwrite",
    "trust_remote_code",
)
