"""Scores and plans of a real model on the CPU and on the device, by every backend: how far apart they are.

    python -m nirvana.benchmarks.real [--model benchmarks/model] [--device cuda]

The model is one that `portable` packed. In fp32 all must agree but for the order of sums; in bf16 the products of two
devices are rounded differently, and what is shown is how much of a plan that moves.
"""

from __future__ import annotations

import copy
import itertools
import os
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

import nirvana
from nirvana.benchmarks import harness, portable
from nirvana.benchmarks.harness import Settings, SkipError
from nirvana.errors import NirvanaError
from nirvana.ops import use_backend

ENVIRONMENT, FOLDER = "NIRVANA_MODEL", "benchmarks/model"
SPARSITIES = (0.2, 0.5)
#: Of scores in fp32, relative to each: 10,000 times what another order of sums costs, and far below a wrong kernel.
ALLOWED = 1e-2


class Found(NamedTuple):
    saliency: nirvana.Saliency
    plans: dict[float, set[tuple[str, int]]]


def grow(settings: Settings, folder: str | None = None) -> Iterator[dict[str, Any]]:
    """The document, each time that a way has been added.

    Raises:
        SkipError: no packed model is here.
        NirvanaError: it is damaged.
    """
    folder = folder or os.environ.get(ENVIRONMENT) or FOLDER
    if not os.path.isdir(folder):
        raise SkipError(f"no folder {folder}: python -m nirvana.benchmarks.portable pack demo {folder}, then send it")
    model, tokens = portable.load(folder)
    if settings.quick:
        tokens = tokens[:2, :32]
    ways = []
    if torch.device(settings.device).type != "cpu":
        ways.append(("cpu", harness.backends("cpu")[-1]))
    ways += [(settings.device, backend) for backend in harness.backends(settings.device)]
    times: list[dict[str, Any]] = []
    pairs: list[dict[str, Any]] = []
    dtypes = (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        done: dict[str, Found] = {}
        # On a CPU bf16 products can be slow; there the device's ways go first.
        for device, backend in ways if dtype == torch.float32 else reversed(ways):
            way = f"{device}, {backend}"
            before = sum(record["seconds"] for record in times if record["way"] == way)
            # One that is killed in the middle would make a failure of what the others have found.
            if settings.late or settings.left < 2 * before:
                note = f"{len(times)} of {len(dtypes) * len(ways)} ways in its time"
                yield _document(settings, times, pairs) | {"note": note}
                return
            found, seconds = _score(model, tokens, dtype, device, backend)
            times.append({"way": way, "dtype": str(dtype)[6:], "seconds": seconds})
            # With the first and with the one before.
            for other in dict.fromkeys([*list(done)[:1], *list(done)[-1:]]):
                pairs.append(_compare(str(dtype)[6:], other, done[other], way, found))
            done[way] = found
            yield _document(settings, times, pairs)


def _score(
    model: PreTrainedModel, tokens: Tensor, dtype: torch.dtype, device: str, backend: str
) -> tuple[Found, float]:
    """In a copy. Seconds are of one pass, kernels compiled in it."""
    mine = copy.deepcopy(model).to(device, dtype)
    start = time.perf_counter()
    with use_backend(backend):
        saliency = nirvana.score(mine, tokens.to(device))
    seconds = time.perf_counter() - start
    plans = {}
    for sparsity in SPARSITIES:
        kept = nirvana.allocate(saliency, mine, sparsity=sparsity).kept
        plans[sparsity] = {(block, unit) for block, units in kept.items() for unit in units}
    return Found(saliency, plans), seconds


def _compare(dtype: str, first: str, a: Found, second: str, b: Found) -> dict[str, Any]:
    """Largest difference of two scores relative to the first, and units that one plan keeps and the other does not."""
    record: dict[str, Any] = {"dtype": dtype, "first": first, "second": second}
    record["largest_relative_difference"] = max(
        float(((b.saliency[block] - values).abs() / values.abs().clamp_min(1e-30)).max())
        for block, values in a.saliency.items()
    )
    for sparsity in SPARSITIES:
        record[f"differing_at_{sparsity:.0%}"] = len(a.plans[sparsity] ^ b.plans[sparsity])
        record[f"kept_at_{sparsity:.0%}"] = len(a.plans[sparsity])
    return record


def _document(settings: Settings, times: list[dict[str, Any]], pairs: list[dict[str, Any]]) -> dict[str, Any]:
    headlines, failures = [], []
    for pair in pairs:
        differing = [(f"{s:.0%}", pair[f"differing_at_{s:.0%}"], pair[f"kept_at_{s:.0%}"]) for s in SPARSITIES]
        plans = ", ".join(
            f"{n} of {kept} units differ at {s}" if n else f"plans equal at {s}" for s, n, kept in differing
        )
        largest = pair["largest_relative_difference"]
        headlines.append(f"{pair['dtype']}: {pair['first']} / {pair['second']}: scores within {largest:.1e}, {plans}")
        if pair["dtype"] == "float32" and not largest <= ALLOWED:
            failures.append(f"{headlines[-1]}; {ALLOWED} allowed")
    result = harness.document("real model", settings, [], seconds=times, pairs=pairs)
    return result | {"headlines": headlines, "failures": failures}


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--model", metavar="FOLDER", help=f"default: ${ENVIRONMENT}, else {FOLDER}")
    args = parser.parse_args()
    *_, document = itertools.chain([None], grow(harness.settings(args), args.model))
    if document is None:
        raise NirvanaError("no time for a single way")
    harness.finish(document, args.json)


if __name__ == "__main__":
    main()
