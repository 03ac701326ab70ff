"""nirvana score: model + calibration text -> saliency file."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from nirvana.checkpoint.atomic import check_target
from nirvana.commands import options, output
from nirvana.deciding import score_batches
from nirvana.models import resolve
from nirvana.pruning import draw
from nirvana.recipe import Recipe
from nirvana.repair import NONE

HELP = "score every unit; writes a saliency file (safetensors)"
EPILOG = "example:\n  nirvana score demo --calibration my.txt --out saliency.safetensors\n"


def add_arguments(parser: ArgumentParser) -> None:
    options.add_model(parser)
    options.add_output(parser, "the saliency file")
    options.add_scoring(parser)
    options.add_batches(parser)


def run(args: Namespace) -> None:
    check_target(args.out, args.overwrite)
    source = resolve(args.model, args.trust_remote_code)
    source.config()
    asked = ("criterion", "objective", "micro_batch", "seed", "batches", "combine")
    recipe = Recipe(repair=NONE, **{name: getattr(args, name) for name in asked})
    sizes = {name: getattr(args, name) for name in ("num_examples", "seq_len", "seed", "packing")}
    batches, _ = draw(args.calibration, source.tokenizer(), recipe, **sizes)
    model = source.model(args.dtype, args.device)
    saliency = score_batches(model, batches, recipe, output.progress(args.quiet or args.json))
    saliency.save(args.out, overwrite=args.overwrite)
    if args.json:
        output.print_json({"saliency": str(args.out), "blocks": len(saliency), "settings": saliency.settings})
    else:
        print(f"{len(saliency)} blocks scored: {args.out}")
