"""`nirvana.score` of a small random model on the device: against float64 on the CPU, and the same bits again.

    python -m nirvana.benchmarks.walks [--device cuda] [--quick]

What only a GPU does differently is all on the way: products of bf16 with fp32 sums at the vocabulary head, a one-hot
product, slopes split in two, one question at the end, layers that are checkpointed or not, attention's backward pass.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

import nirvana
from nirvana.benchmarks import harness
from nirvana.benchmarks.harness import Settings
from nirvana.benchmarks.models import random_model
from nirvana.benchmarks.shapes import QUICK

#: So many blocks of keys that the order in which attention's backward pass adds them shows, unless it is fixed.
EXAMPLES, SEQ_LEN = 4, 500
#: (criterion, objective)
ASKED = (("nirvana", "max-logit"), ("nirvana", "nll"), ("mask-fisher", "nll"), ("wanda-sp", None))
#: Largest relative error of a block's scores, by Euclidean norm. That of bf16 is what activations of 8 bits leave: with
#: this model a CPU comes to 0.018, and to 6e-7 in fp32.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 0.06}


def run(settings: Settings) -> dict[str, Any]:
    """A record for each type and criterion; what is wrong is named under ``failures``."""
    records, failures = [], []
    examples, seq_len = (2, 40) if settings.quick else (EXAMPLES, SEQ_LEN)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(300, (examples, seq_len), generator=generator)
    for dtype, tolerance in TOLERANCES.items():
        model = random_model(QUICK, dtype, settings.device)
        exact_model = copy.deepcopy(model).cpu().double()
        for criterion, objective in ASKED:
            options = {"criterion": criterion, "objective": objective}
            name = f"{str(dtype)[6:]}, {criterion}{f', {objective}' if objective else ''}"
            try:
                exact = nirvana.score(exact_model, tokens, **options)
                first, second, checkpointed = (
                    nirvana.score(model, tokens, gradient_checkpointing=choice, **options)
                    for choice in (False, False, True)
                )
            except Exception as error:
                failures.append(f"{name}: {type(error).__name__}: {error}")
                continue
            error = max(_error(first[block], values) for block, values in exact.items())
            same, same_checkpointed = (harness.same_bits(first, other) for other in (second, checkpointed))
            records.append({"scores": name, "error": error, "again": same, "checkpointed": same_checkpointed})
            if not error <= tolerance:
                failures.append(f"{name}: relative error {error:.2g} against float64, {tolerance:g} allowed")
            if not (same and same_checkpointed):
                failures.append(f"{name}: other bits the second time" + (", with layers checkpointed" if same else ""))
    headlines = []
    for dtype in TOLERANCES:
        errors = [record["error"] for record in records if record["scores"].startswith(str(dtype)[6:])]
        if errors:
            headlines.append(f"{str(dtype)[6:]}: {len(errors)} criteria, relative error {max(errors):.1g} at most")
    return harness.document("walks", settings, [], scores=records) | {"failures": failures, "headlines": headlines}


def _error(scores: torch.Tensor, exact: torch.Tensor) -> float:
    """NaN where a score is."""
    return float((scores.double() - exact.double()).norm() / exact.double().norm())


def main() -> None:
    args = harness.parser(__doc__).parse_args()
    result = run(harness.settings(args))
    harness.finish(result, args.json)
    if result["failures"]:
        raise SystemExit("\n".join(result["failures"]))


if __name__ == "__main__":
    main()
