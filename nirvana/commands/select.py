"""nirvana select: several calibration batches -> the saliency and the plan of the best."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from nirvana.checkpoint.atomic import atomic_directory, check_target
from nirvana.commands import options, output
from nirvana.interruption import interruptions_held
from nirvana.models import resolve
from nirvana.recipe import AUTO
from nirvana.retention import kept_saliency_line
from nirvana.selection import (
    GammaSearch,
    Probe,
    Selection,
    check_criterion,
    check_search,
    draw_candidates,
    search_gamma,
    select,
)
from nirvana.selection.plot import draw

HELP = "choose the calibration batch (and gamma) whose pruned model stays closest to the dense one"
EPILOG = """\
examples:
  nirvana select demo --sparsity 0.2 --candidates 8 --out chosen
  nirvana apply demo --plan chosen/plan.json --out smaller
  nirvana select demo --sparsity 0.5 --candidates 9 --calibration my.txt,my.jsonl --gamma auto --out chosen

Interrupted, the same command goes on after the last finished candidate.
"""


def add_arguments(parser: ArgumentParser) -> None:
    options.add_model(parser)
    options.add_output(parser, "selection.json, saliency.safetensors, plan.json and selection.png")
    options.add_selection(parser, candidates=8)
    parser.add_argument(
        "--state", metavar="FILE", help="where finished candidates are kept until the end (default: PATH.state)"
    )
    options.add_allocation(parser)
    options.add_scoring(parser)


def run(args: Namespace) -> None:
    check_target(args.out, args.overwrite, directory=True)
    rule = options.width_rule(args)
    # What would be refused after all candidates is refused now.
    check_criterion(args.criterion)
    if args.gamma == AUTO:
        check_search(rule)
    state = check_target(args.state or f"{args.out.rstrip('/')}.state", overwrite=True)
    source = resolve(args.model, args.trust_remote_code)
    source.config()
    drawn = draw_candidates(
        args.calibration,
        source.tokenizer(),
        count=args.candidates,
        num_examples=args.num_examples,
        seq_len=args.seq_len,
        seed=args.seed,
        packing=args.packing,
        probe=args.probe,
        probe_examples=args.probe_examples,
    )
    model = source.model(args.dtype, args.device)
    progress = output.progress(args.quiet or args.json)
    search = None
    probe = Probe(model, drawn.probe.tokens, micro_batch=args.micro_batch)
    selection = select(
        model,
        drawn.batches,
        probe,
        rule,
        criterion=args.criterion,
        objective=args.objective,
        micro_batch=args.micro_batch,
        seed=args.seed,
        state=state,
        progress=progress,
    )
    if args.gamma == AUTO:
        search = search_gamma(model, selection.saliency, probe, rule, progress=progress)
    plan = selection.plan if search is None else search.plan
    report: dict[str, Any] = {
        "selection": str(args.out),
        "sparsity": plan.sparsity,
        "kept_saliency": plan.settings["kept_saliency"],
        "totals": plan.totals,
        **selection.to_dict(),
        "gamma": {"gamma": rule.gamma, "curve": []} if search is None else search.to_dict(),
        "probe": {"source": drawn.probe.manifest["source"], "shape": list(drawn.probe.tokens.shape)},
    }
    picture = draw(report)
    # The state goes when the result is there and not before; both are small.
    with interruptions_held():
        with atomic_directory(args.out, args.overwrite) as folder:
            manifests = {"candidates": [b.manifest for b in drawn.batches], "probe": drawn.probe.manifest}
            written = json.dumps({**report, "manifests": manifests}, indent=2)
            (folder / "selection.json").write_text(written + "\n", encoding="utf-8")
            selection.saliency.save(folder / "saliency.safetensors")
            plan.save(folder / "plan.json")
            if picture is not None:
                (folder / "selection.png").write_bytes(picture)
        state.unlink(missing_ok=True)
    if args.json:
        output.print_json(report)
        return
    _print(report, selection, search)
    print(f"\n{output.plan_line(plan)}")
    if line := kept_saliency_line(plan.settings):
        print(line)
    if picture is None:
        print("no plot: it needs matplotlib (pip install 'nirvana[bench]')")
    print(f"plan:     {Path(args.out) / 'plan.json'}\nsaliency: {Path(args.out) / 'saliency.safetensors'}")


def _print(report: dict[str, Any], selection: Selection, search: GammaSearch | None) -> None:
    rows = [["candidate", "corpus", "KL (nats/token)", "perplexity", "scoring", "probe"]]
    for one in selection.candidates:
        mark = f"{one.index} <- best" if one.index == selection.best else str(one.index)
        figures = [f"{one.kl:.4f}", f"{one.perplexity:.2f}", f"{one.score_seconds:.1f} s", f"{one.probe_seconds:.1f} s"]
        rows.append([mark, one.source, *figures])
    output.print_table(rows)
    examples, length = report["probe"]["shape"]
    print(
        f"\nprobe: {report['probe']['source']}, {examples} x {length} tokens, in no candidate; "
        f"perplexity of the dense model there {selection.dense_perplexity:.2f}"
    )
    kls = [one.kl for one in selection.candidates]
    print(f"chosen: candidate {selection.best}, KL {min(kls):.4f}; mean of {len(kls)}: {sum(kls) / len(kls):.4f}")
    if selection.resumed:
        print(f"{selection.resumed} of {len(kls)} were finished before an interruption")
    if search is not None:
        best = next(point for point in search.curve if point["gamma"] == search.gamma)
        probed = sum(point.get("probed", False) for point in search.curve)
        print(f"gamma: {search.gamma:g}, KL {best['kl']:.4f}, the best of {probed} plans")
