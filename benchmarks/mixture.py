"""mixture_bounds: CPU kernel and reference on neurons of the demo model, scikit-learn on a sample of them.

python -m nirvana.benchmarks.mixture [--neurons 46080] [--reference 256] [--sample 16] [--json FILE]

Neurons are rows of gradient times weight (gate, up and down: 3 x 576 scores), of all layers in turn. Each way is timed
once over its own number of rows, the first ones, and checked: the reference and the kernel against scikit-learn from
their start. What a way would take for all neurons is its time a row times their number; "extrapolated" says where it
did not do them all. scikit-learn is timed as its users call it, from its own random start, but in one thread, which is
its fastest; what it would take for all neurons is counted as if one such process ran on each thread. The record of
agreements says how often that start alone moves a result.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nirvana import models
from nirvana.benchmarks import environment, harness
from nirvana.calibration.corpora import BUILT_IN
from nirvana.ops import MixtureBounds, mixture_bounds, use_backend
from nirvana.ops.backends import reference_mixture

COMPONENTS, FRACTION = 5, 0.02
#: Of the rows of the sample: same number of components, bounds within 1 % of the range.
AGREEMENT = 0.95


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


def scikit_learn(scores: Tensor, seed: int | None = 0) -> MixtureBounds:
    """Row by row, from a random start, or from that of nirvana (`seed` None)."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        rows = [_row(row, seed) for row in scores.double()]
    low, high, components = zip(*rows, strict=True)
    return MixtureBounds(torch.tensor(low), torch.tensor(high), torch.tensor(components))


def _row(row: Tensor, seed: int | None) -> tuple[float, float, int]:
    ordered = row.sort().values
    z = (ordered - ordered.mean()) / ordered.std(correction=0)
    x, cuts, found = z[:, None].numpy(), torch.tensor([[0, len(z)]]), []
    for count in range(1, COMPONENTS + 1):
        if seed is None and count > 1:
            cuts = reference_mixture._kmeans(z[None], cuts)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that 100 iterations were not enough
            found.append(_mixture(count, seed, z, cuts[0].tolist()).fit(x))
    model = min(found, key=lambda model: model.bic(x))
    density = torch.from_numpy(model.score_samples(x))
    dense = (density >= density.sort().values[int(FRACTION * len(z))]).nonzero()
    return ordered[dense[0]].item(), ordered[dense[-1]].item(), model.n_components


def _mixture(count: int, seed: int | None, z: Tensor, cuts: list[int]) -> Any:
    from sklearn.mixture import GaussianMixture

    if seed is not None:
        return GaussianMixture(count, random_state=seed)
    parts = [z[a:b] for a, b in itertools.pairwise(cuts)]
    return GaussianMixture(
        count,
        weights_init=torch.tensor([len(part) / len(z) for part in parts], dtype=torch.float64).numpy(),
        means_init=torch.stack([part.mean() for part in parts])[:, None].numpy(),
        precisions_init=torch.stack([1 / (part.var(correction=0) + 1e-6) for part in parts])[:, None, None].numpy(),
        init_params="random_from_data",  # of no effect beside the three above
        random_state=0,
    )


def agreement(first: MixtureBounds, second: MixtureBounds, scores: Tensor) -> float:
    """Share of the rows that both have of the same number of components, and bounds within 1 % of the row's range."""
    count = min(len(first.low), len(second.low))
    first, second = (MixtureBounds(*(part[:count] for part in each)) for each in (first, second))
    allowed = 0.01 * (scores[:count].amax(1) - scores[:count].amin(1))
    near = ((first.low - second.low).abs() <= allowed) & ((first.high - second.high).abs() <= allowed)
    return (near & (first.components == second.components)).double().mean().item()


def run(settings: harness.Settings, neurons: int, reference: int, sample: int) -> dict[str, Any]:
    scores = demo_scores(neurons)
    # Layers lie behind each other; any number of first rows is to hold all of them.
    scores = scores[torch.randperm(neurons, generator=torch.Generator().manual_seed(0))]
    ways: dict[str, tuple[int, Callable[[Tensor], MixtureBounds]]] = {
        "scikit-learn": (sample, scikit_learn),
        "nirvana, torch": (reference, mixture_bounds),
        **({"nirvana, cpu": (neurons, mixture_bounds)} if "cpu" in harness.backends("cpu") else {}),
    }
    times, results = [], {}
    for name, (rows, call) in ways.items():
        part = scores[: min(rows, neurons)]
        with use_backend(name.removeprefix("nirvana, ") if call is mixture_bounds else "auto"):
            call(part[:2])
            start = time.perf_counter()
            results[name] = call(part)
            seconds = time.perf_counter() - start
        processes = torch.get_num_threads() if call is scikit_learn else 1
        total = seconds / len(part) * neurons / processes
        times.append(
            {"way": name, "rows": len(part), "seconds": seconds, "ms_per_row": 1e3 * seconds / len(part)}
            | {"processes": processes, "seconds_for_all": total, "extrapolated": len(part) < neurons}
        )
    for record in times:
        record["times_scikit_learn"] = times[0]["seconds_for_all"] / record["seconds_for_all"]
    results["scikit-learn, start of nirvana"] = scikit_learn(scores[:sample], None)
    results["scikit-learn, another seed"] = scikit_learn(scores[:sample], 1)
    agreements = [
        {
            "first": a,
            "second": b,
            "rows": min(len(results[a].low), len(results[b].low)),
            "agree": agreement(results[a], results[b], scores),
        }
        for a, b in itertools.combinations(results, 2)
    ]
    for record in agreements:
        pair = (record["first"], record["second"])
        if pair[0].startswith("nirvana") and pair[1] != "scikit-learn, another seed" and record["agree"] < AGREEMENT:
            raise harness.WrongResultError(f"{' and '.join(pair)} agree on {record['agree']:.0%} of the neurons")
    document = harness.document("mixture", settings, [], mixture_bounds=times, agreement=agreements)
    return document | {"environment": environment.describe("cpu")}


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--neurons", type=int, default=46_080, metavar="N", help="of the demo model (default: all)")
    parser.add_argument("--reference", type=int, default=256, metavar="N", help="rows of the reference (default: 256)")
    parser.add_argument("--sample", type=int, default=16, metavar="N", help="rows of scikit-learn (default: 16)")
    args = parser.parse_args()
    settings = harness.settings(args)
    neurons, reference, sample = (60, 30, 2) if settings.quick else (args.neurons, args.reference, args.sample)
    harness.finish(run(settings, neurons, reference, sample), args.json)


if __name__ == "__main__":
    main()
