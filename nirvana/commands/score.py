"""nirvana score: model + calibration text -> saliency file."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from nirvana.architectures import describe
from nirvana.calibration import load_batch
from nirvana.checkpoint.atomic import check_target
from nirvana.commands import options, output
from nirvana.models import resolve
from nirvana.saliency import needs_calibration, score

HELP = "score every unit; writes a saliency file (safetensors)"
EPILOG = "example:\n  nirvana score demo --calibration my.txt --out saliency.safetensors\n"


def add_arguments(parser: ArgumentParser) -> None:
    options.add_model(parser)
    options.add_output(parser, "the saliency file")
    options.add_scoring(parser)


def run(args: Namespace) -> None:
    check_target(args.out, args.overwrite)
    source = resolve(args.model, args.trust_remote_code)
    blocks = describe(source.config()).blocks
    tokens = None
    if needs_calibration(args.criterion):
        tokens = load_batch(
            args.calibration,
            source.tokenizer(),
            num_examples=args.num_examples,
            seq_len=args.seq_len,
            seed=args.seed,
        )
    model = source.model(args.dtype, args.device)
    total = sum(part.scored for block in blocks for part in block.slices)
    with output.progress(args.quiet or args.json).stage("score", total) as advance:
        saliency = score(
            model,
            tokens,
            criterion=args.criterion,
            objective=args.objective,
            micro_batch=args.micro_batch,
            seed=args.seed,
            progress=lambda: advance(1),
        )
    if tokens is not None:
        saliency.settings |= {"calibration": str(args.calibration), "seed": args.seed}
    saliency.save(args.out, overwrite=args.overwrite)
    if args.json:
        output.print_json({"saliency": str(args.out), "blocks": len(saliency), "settings": saliency.settings})
    else:
        print(f"{len(saliency)} blocks scored: {args.out}")
