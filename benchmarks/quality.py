"""How good the pruned model is before any fine-tuning: every choice that nirvana offers, at equal size, on real text.

    python -m nirvana.benchmarks.quality --calibration c4.jsonl --text wikitext2=wiki.test.raw.txt --text novels

All ways see the same calibration tokens and keep the same number of parameters (each row says how many). Perplexity and
KL to the dense model are of texts that nothing was calibrated on, in windows of 512 tokens; gamma, candidates and the
like are chosen on a probe that is in neither. Rows are added to the JSON as they come, so that an interrupted run goes
on; a summary with mean and standard deviation over the seeds is printed and written beside it.

"selection" chooses among 8 batches of 32 examples, the size that was published; "mean" and "median" combine the scores
of the same 8. So they see more text than the other ways.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import nirvana
from nirvana.benchmarks import environment
from nirvana.calibration import CalibrationBatch, read_documents
from nirvana.calibration.corpora import EVALUATION
from nirvana.checkpoint.atomic import write_file
from nirvana.commands import output
from nirvana.deciding import decide
from nirvana.evaluation.text import text_windows
from nirvana.masking import masked
from nirvana.models import resolve
from nirvana.progress import Progress
from nirvana.recipe import PRESETS, Recipe
from nirvana.repair.weights import OutputWeights
from nirvana.saliency import Saliency, combine, score
from nirvana.selection import Probe, draw_candidates
from nirvana.widths import WidthRule

WINDOW, CANDIDATES, CANDIDATE_EXAMPLES, PROBE_EXAMPLES = 512, 8, 32, 16
SPARSITIES = (0.2, 0.4, 0.5)
CRITERIA = ("nirvana", "mask-fisher")
PUBLISHED, BEST = "nirvana", "best"
STEPS = 2

#: What is tried with each criterion, beside the criterion alone.
PARTS: dict[str, dict[str, Any]] = {
    "+ repair": {"repair": "least-squares"},
    "+ repair, strength auto": {"repair": "least-squares", "repair_strength": "auto"},
    "+ gamma auto": {"search_gamma": True},
    "+ steps": {"steps": STEPS},
}

#: What is tried with the scores of several batches.
OF_BATCHES = ("+ selection", "+ mean of batches", "+ median of batches")


def ways() -> dict[str, dict[str, Any]]:
    """Name -> arguments of `Recipe`, those first that matter most."""
    best = {name: value for name, value in PRESETS["best"].items() if name != "gamma"}
    listed: dict[str, dict[str, Any]] = {name: {"criterion": name} for name in CRITERIA}
    listed[BEST] = {**best, "search_gamma": True}
    listed["best + steps"] = {**listed[BEST], "steps": STEPS}
    listed |= {name: {"criterion": name} for name in ("+".join(CRITERIA), "random", "magnitude")}
    for part, options in PARTS.items():
        listed |= {f"{name} {part}": {"criterion": name, **options} for name in CRITERIA}
    listed |= {f"{name} + repair": {"criterion": name, **PARTS["+ repair"]} for name in ("random", "magnitude")}
    return {name: {"repair": "none", **options} for name, options in listed.items()}


Drawn = tuple[Tensor, tuple[Tensor, ...], Tensor]


class Bench:
    """One seed: its batches, its probe, and scores of the dense model that several ways share."""

    def __init__(self, model: PreTrainedModel, texts: dict[str, Probe], drawn: Drawn, seed: int):
        self.model, self.texts, self.seed = model, texts, seed
        self.batch, self.candidates, probe = drawn
        self.probe = Probe(model, probe)
        self._scores: dict[str, Saliency] = {}
        self._gamma: dict[tuple[str, float], float] = {}
        self._of_candidates: dict[str, list[Saliency]] = {}

    def scores(self, criterion: str) -> Saliency:
        if criterion == "+".join(CRITERIA):  # what `score` does, from what has been scored
            return combine([self.scores(name) for name in CRITERIA], "rank-mean", self.model)
        if criterion not in self._scores:
            self._scores[criterion] = score(self.model, self.batch, criterion=criterion, seed=self.seed)
        return self._scores[criterion]

    def run(self, recipe: Recipe, sparsity: float) -> dict[str, Any]:
        """Prune, evaluate the smaller model, put the dense weights back."""
        dense = OutputWeights(self.model, nirvana.describe(self.model))
        rule, searched = WidthRule(sparsity), (recipe.criterion, sparsity)
        if recipe.search_gamma and searched in self._gamma:
            rule, recipe = WidthRule(sparsity, self._gamma[searched]), replace(recipe, search_gamma=False)
        try:
            decision = decide(
                self.model,
                [CalibrationBatch(self.batch, {"source": "calibration"})],
                self.probe.tokens if recipe.needs_probe else None,
                rule,
                recipe,
                Progress(),
                self.scores(recipe.criterion),
                dense,
            )
            small = nirvana.apply(self.model, decision.plan)
        finally:
            dense.restore()
        if recipe.search_gamma:
            self._gamma[searched] = decision.plan.settings["gamma"]
        return self._evaluate(small, decision.plan)

    def of_batches(self, criterion: str, part: str, sparsity: float) -> dict[str, Any]:
        """The candidate with the smallest KL on the probe, or the scores of all candidates combined."""
        if criterion not in self._of_candidates:
            scores = [score(self.model, tokens, criterion=criterion, seed=self.seed) for tokens in self.candidates]
            self._of_candidates[criterion] = scores
        if part != OF_BATCHES[0]:
            saliency = combine(self._of_candidates[criterion], part.split()[1], self.model)
            plan = nirvana.allocate(saliency, self.model, sparsity=sparsity)
            return self._evaluate(nirvana.apply(self.model, plan), plan)
        kls, plans = [], []
        for saliency in self._of_candidates[criterion]:
            plans.append(nirvana.allocate(saliency, self.model, sparsity=sparsity))
            with masked(self.model, plans[-1]):
                kls.append(self.probe.divergence().kl)
        best = min(range(len(kls)), key=kls.__getitem__)
        figures = self._evaluate(nirvana.apply(self.model, plans[best]), plans[best])
        return {**figures, "candidates_kl": kls, "chosen": best}

    def _evaluate(self, small: PreTrainedModel, plan: nirvana.PruningPlan) -> dict[str, Any]:
        results = {name: text.divergence(small) for name, text in self.texts.items()}
        return {
            "perplexity": {name: result.perplexity for name, result in results.items()},
            "kl": sum(result.kl for result in results.values()) / len(results),
            "parameters": plan.totals["parameters_after"],
            "prunable": plan.totals["prunable_after"],
            "gamma": plan.settings["gamma"],
        }


def begun(parser: argparse.ArgumentParser, out: Path, fresh: dict[str, Any]) -> dict[str, Any]:
    """The document that an interrupted run with the same settings left at `out`, or a fresh one."""
    if not out.exists():
        return {**fresh, "environment": environment.describe("cpu")}
    document = json.loads(out.read_text())
    if document["settings"] != fresh["settings"]:
        parser.error(f"{out} holds results of other settings; choose another --out")
    return document


def write(out: Path, document: dict[str, Any]) -> None:
    write_file(out, (json.dumps(document, indent=1) + "\n").encode(), overwrite=True)


def read_texts(named: list[str], model: PreTrainedModel, tokenizer: Any, windows: int) -> dict[str, Probe]:
    """Evenly spaced windows of each text; ``novels`` are the held-out ones of the package, others are NAME=FILE."""
    texts = {}
    for text in named:
        name, _, file = text.partition("=")
        documents = read_documents(file or (EVALUATION if name == "novels" else name))
        texts[name] = Probe(model, torch.stack(text_windows(tokenizer, documents, WINDOW, WINDOW, windows)))
    return texts


def draw(args: argparse.Namespace, tokenizer: Any, seed: int) -> Drawn:
    """Tokens of the batch, of the candidates and of the probe. The batch begins with the candidates' examples."""
    count = max(CANDIDATES, -(-args.num_examples // CANDIDATE_EXAMPLES))
    sizes = {"num_examples": CANDIDATE_EXAMPLES, "seq_len": args.seq_len, "probe_examples": PROBE_EXAMPLES}
    drawn = draw_candidates(args.calibration, tokenizer, count=count, seed=seed, **sizes)
    candidates = tuple(batch.tokens for batch in drawn.batches)
    return torch.cat(candidates)[: args.num_examples], candidates[:CANDIDATES], drawn.probe.tokens


def rows(seeds: int, ablations: int) -> Iterator[tuple[int, str, float]]:
    """(seed, way, sparsity), those first that are most worth having."""
    of_batches = [f"{criterion} {part}" for criterion in CRITERIA for part in OF_BATCHES]
    slow = [f"{criterion} + steps" for criterion in (BEST, *CRITERIA)]
    for way in [*(way for way in ways() if way not in slow), *of_batches, *slow]:
        for seed in range(seeds if way in (*CRITERIA, "+".join(CRITERIA), BEST) else ablations):
            if way != "magnitude" or seed == 0:  # nothing is drawn
                yield from ((seed, way, sparsity) for sparsity in SPARSITIES)


def summary(document: dict[str, Any]) -> list[list[str]]:
    """A line for each sparsity and way: mean and standard deviation over the seeds, and the change from published."""
    table = [["sparsity", "way", "seeds", *document["dense"]["perplexity"], "KL", "change of perplexity"]]
    names = list(dict.fromkeys(way for _, way, _ in rows(1, 1)))
    for sparsity in SPARSITIES:
        at = {w: [r for r in document["rows"] if r["way"] == w and r["sparsity"] == sparsity] for w in names}
        for way, found in at.items():
            if not found:
                continue
            texts = [[row["perplexity"][text] for row in found] for text in document["dense"]["perplexity"]]
            # Against the published settings with the same seeds: calibration batches differ more than ways do.
            seeds = {row["seed"] for row in found}
            base = [row for row in at[PUBLISHED] if row["seed"] in seeds]
            changes = []
            for text, mine in zip(document["dense"]["perplexity"], texts, strict=True):
                published = statistics.mean(row["perplexity"][text] for row in base)
                changes.append(f"{statistics.mean(mine) / published - 1:+.0%}")
            cells = [_spread(values, 1) for values in texts] + [_spread([row["kl"] for row in found], 3)]
            table.append([f"{sparsity:.0%}", way, str(len(found)), *cells, " / ".join(changes)])
    return table


def _spread(values: list[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration", required=True, help="corpus or file; held-out parts of it are the probe")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE|novels", help="to evaluate on")
    parser.add_argument("--num-examples", type=int, default=96)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--windows", type=int, default=6, help="of each text")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--ablations", type=int, default=1, help="seeds of all but the criteria alone and the best")
    parser.add_argument("--ways", nargs="*", metavar="WAY", help="only these, e.g. best 'nirvana + repair'")
    parser.add_argument("--out", type=Path, default=Path("quality.json"))
    args = parser.parse_args(argv)
    settings = {k: getattr(args, k) for k in ("model", "num_examples", "seq_len", "windows")}
    settings["calibration"] = Path(args.calibration).name
    document = begun(parser, args.out, {"benchmark": "quality", "settings": settings, "rows": []})
    source = resolve(args.model)
    model, tokenizer = source.model("float32", "cpu"), source.tokenizer()
    texts = read_texts(args.text, model, tokenizer, args.windows)
    document["dense"] = {"perplexity": {name: text.dense().perplexity for name, text in texts.items()}}
    done = {(row["seed"], row["way"], row["sparsity"]) for row in document["rows"]}
    benches: dict[int, Bench] = {}
    for seed, way, sparsity in rows(args.seeds, args.ablations):
        if (seed, way, sparsity) in done or (args.ways and way not in args.ways):
            continue
        if seed not in benches:
            benches[seed] = Bench(model, texts, draw(args, tokenizer, seed), seed)
        criterion, _, part = way.partition(" ")
        if part in OF_BATCHES:
            figures = benches[seed].of_batches(criterion, part, sparsity)
        else:
            figures = benches[seed].run(Recipe(seed=seed, **ways()[way]), sparsity)
        document["rows"].append({"seed": seed, "way": way, "sparsity": sparsity, **figures})
        write(args.out, document)
        perplexities = ", ".join(f"{name} {value:.1f}" for name, value in figures["perplexity"].items())
        print(
            f"seed {seed}, {sparsity:.0%}, {way}: {perplexities}, KL {figures['kl']:.3f}", file=sys.stderr, flush=True
        )
    output.print_table(summary(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
