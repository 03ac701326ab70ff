"""What choosing a calibration batch by KL is worth: the chosen candidate against the mean candidate and against the
scores of all candidates combined, repeated.

    python -m nirvana.benchmarks.candidates --calibration c4.jsonl --text wikitext2=wiki.test.raw.txt --text novels

Each repetition draws its own candidates and its own probe. KL on the probe chooses; perplexity is of other texts, so it
says whether the choice holds elsewhere. Repetitions are added to the JSON as they come: an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import nirvana
from nirvana.benchmarks.quality import PROBE_EXAMPLES, begun, read_texts, write
from nirvana.commands import output
from nirvana.masking import masked
from nirvana.models import resolve
from nirvana.saliency import combine, score
from nirvana.selection import Probe, draw_candidates

#: Ways to combine the scores of all candidates, beside choosing one.
COMBINED = ("mean", "median")


def repetition(
    model: Any, tokenizer: Any, texts: dict[str, Probe], args: argparse.Namespace, seed: int
) -> dict[str, Any]:
    """KL on the probe and perplexity on each text, of every candidate of one draw."""
    sizes = {"num_examples": args.num_examples, "seq_len": args.seq_len, "probe_examples": PROBE_EXAMPLES}
    drawn = draw_candidates(args.calibration, tokenizer, count=args.candidates, seed=seed, **sizes)
    probe = Probe(model, drawn.probe.tokens)
    scores = [score(model, batch.tokens, criterion=args.criterion, seed=seed) for batch in drawn.batches]
    figures = []
    for saliency in [*scores, *(combine(scores, how, model) for how in COMBINED)]:
        plan = nirvana.allocate(saliency, model, sparsity=args.sparsity)
        with masked(model, plan):
            kl = probe.divergence().kl
        small = nirvana.apply(model, plan)
        figures.append({"kl": kl} | {name: text.divergence(small).perplexity for name, text in texts.items()})
    return {
        "seed": seed,
        "candidates": figures[: len(scores)],
        "combined": dict(zip(COMBINED, figures[len(scores) :], strict=True)),
    }


def summary(repetitions: list[dict[str, Any]]) -> list[list[str]]:
    """KL and perplexities of each repetition: the candidates (mean and deviation), the chosen one, the combinations."""
    names = list(repetitions[0]["candidates"][0])
    table = [["seed", "", "KL", *names[1:]]]
    changes: dict[str, list[list[float]]] = {}
    for one in repetitions:
        means = [statistics.mean(each[name] for each in one["candidates"]) for name in names]
        spread = [statistics.stdev(each[name] for each in one["candidates"]) for name in names]
        cells = [f"{mean:.3f} ± {deviation:.3f}" for mean, deviation in zip(means, spread, strict=True)]
        table.append([str(one["seed"]), "mean of candidates", *cells])
        chosen = min(one["candidates"], key=lambda each: each["kl"])
        for label, figures in {"chosen": chosen, **one["combined"]}.items():
            values = [figures[name] for name in names]
            table.append([str(one["seed"]), label, *(f"{value:.3f}" for value in values)])
            changes.setdefault(label, []).append([v / m - 1 for v, m in zip(values, means, strict=True)])
    for label, rows in changes.items():
        columns = list(zip(*rows, strict=True))
        table.append(["all", f"{label}, against the mean", *(f"{statistics.mean(column):+.1%}" for column in columns)])
    return table


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration", required=True, help="corpus or file")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE|novels", help="to evaluate on")
    parser.add_argument("--criterion", default="nirvana")
    parser.add_argument("--sparsity", type=float, default=0.2)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--num-examples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--windows", type=int, default=4, help="of each text")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("candidates.json"))
    args = parser.parse_args(argv)
    names = ("model", "criterion", "sparsity", "candidates", "num_examples", "seq_len", "windows")
    settings = {name: getattr(args, name) for name in names} | {"calibration": Path(args.calibration).name}
    document = begun(parser, args.out, {"benchmark": "candidates", "settings": settings, "repetitions": []})
    source = resolve(args.model)
    model, tokenizer = source.model("float32", "cpu"), source.tokenizer()
    texts = read_texts(args.text, model, tokenizer, args.windows)
    for seed in range(len(document["repetitions"]), args.repetitions):
        document["repetitions"].append(repetition(model, tokenizer, texts, args, seed))
        write(args.out, document)
        print(f"seed {seed} done", file=sys.stderr, flush=True)
    output.print_table(summary(document["repetitions"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
