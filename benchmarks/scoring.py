"""A whole scoring pass of a randomly initialised model: where the time goes, and the peak of memory.

    python -m nirvana.benchmarks.scoring [--model Llama-3.1-8B]

The reference does what the method's published code does: one backward pass that leaves the gradients of all parameters,
then clone, multiply, absolute value and norm of each weight, then boolean masks. All ways get the same model. Their
stages differ: ours runs the vocabulary head in the objective, and, where layers are checkpointed, their forward passes
again in the backward pass. `nirvana` chooses by free memory: of Llama-3.1-8B with 32 x 128 tokens a layer saves 0.81 GB
for its backward pass (counted), so that an 80 GB card keeps them all, and the checkpointed way has the smallest peak.
Both must give the same bits, in every round.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import statistics
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import PreTrainedModel

import nirvana
from nirvana import ops
from nirvana.architectures import Architecture
from nirvana.benchmarks import harness
from nirvana.benchmarks.harness import Settings, WrongResultError
from nirvana.benchmarks.models import random_model
from nirvana.benchmarks.peak import Peak
from nirvana.benchmarks.saliency import published
from nirvana.benchmarks.shapes import QUICK
from nirvana.benchmarks.stopwatch import Stopwatch
from nirvana.patching import forward_replaced
from nirvana.saliency import objectives

EXAMPLES, SEQ_LEN = 32, 128
#: Of the prunable parameters; what both ways cut away at the end.
SPARSITY = 0.5
ROUNDS = 3

Scores = dict[str, Tensor]


def ours(
    model: PreTrainedModel, tokens: Tensor, watch: Stopwatch, gradient_checkpointing: bool | None = None
) -> Scores:
    """`nirvana.score`, with stopwatches at the seams."""
    reduce = mock.patch.object(ops.saliency, "_launch", watch.around("scoring", ops.saliency._launch))
    objective = {"max-logit": watch.around("objective", objectives.max_logit)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(reduce)
        stack.enter_context(mock.patch.dict(objectives.OBJECTIVES, objective))
        stack.enter_context(forward_replaced(model, lambda forward: watch.around("forward", forward)))
        with watch("pass"):
            return dict(nirvana.score(model, tokens, gradient_checkpointing=gradient_checkpointing))


def reference(model: PreTrainedModel, tokens: Tensor, watch: Stopwatch) -> Scores:
    scores: Scores = {}
    with watch("pass"):
        with watch("forward"):
            logits = model(input_ids=tokens, use_cache=False).logits
        with watch("objective"):
            value = logits.max(dim=1)[0].mean()
        value.backward()
        with watch("scoring"), torch.no_grad():
            for block in nirvana.describe(model).blocks:
                for part in block.slices:
                    weight = model.get_parameter(part.tensor)
                    mine = published(weight.data, weight.grad, part.axis, part.unit)
                    scores[block.name] = scores[block.name] + mine if block.name in scores else mine
    model.zero_grad(set_to_none=True)
    return scores


def cut_ours(model: PreTrainedModel, architecture: Architecture, kept: dict[str, Tensor]) -> None:
    """Cut every prunable weight, each result dropped at once: memory for a second model is not the matter here."""
    for block in architecture.blocks:
        for part in block.slices:
            weight = model.get_parameter(part.tensor).detach()
            ops.gather_slice(weight, kept[block.name], axis=part.axis, unit=part.unit)


def cut_reference(model: PreTrainedModel, architecture: Architecture, kept: dict[str, Tensor]) -> None:
    for block in architecture.blocks:
        for part in block.slices:
            weight = model.get_parameter(part.tensor).detach()
            mask = torch.zeros(block.size, dtype=torch.bool, device=weight.device)
            mask[kept[block.name]] = True
            mask = mask.repeat_interleave(part.unit)
            weight[mask] if part.axis == 0 else weight[:, mask]


WAYS = {
    "reference": (reference, cut_reference),
    "nirvana, checkpointed": (functools.partial(ours, gradient_checkpointing=True), cut_ours),
    "nirvana": (ours, cut_ours),
}


def grow(settings: Settings, name: str = "Llama-3.1-8B", examples: int = EXAMPLES) -> Iterator[dict[str, Any]]:
    """The document, each time that a way has been added; of one that takes too much memory it says so."""
    device = settings.device
    dtype = torch.bfloat16
    seq_len = SEQ_LEN
    if settings.quick:
        name, examples, seq_len, dtype = QUICK, 2, 16, torch.float32
    model = random_model(name, dtype, device)
    architecture = nirvana.describe(model)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (examples, seq_len), generator=generator).to(device)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    title = f"{name} {str(dtype)[6:]}, {examples} x {seq_len} tokens"
    scores: dict[str, Scores] = {}
    medians: dict[str, dict[str, float]] = {}
    failures: list[str] = []
    # One way after the other: what one leaves in the allocator would make the other search and free in its time.
    for way in reversed(WAYS):
        gc.collect()
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()
        try:
            scores[way], medians[way] = _measure(way, model, architecture, tokens, settings)
        except torch.OutOfMemoryError as error:
            if way != "reference":
                raise
            print(f"{way}: out of memory: {error}")
        except WrongResultError as error:
            failures.append(str(error))
        records = [_record(way, medians, weights) for way in WAYS]
        headlines = [f"{title}: {_headline(record)}" for record in records]
        result = harness.document("scoring", settings, [], **{title: records})
        if way == "nirvana, checkpointed" and len(scores) == 2 and not harness.same_bits(*scores.values()):
            failures.append("scores of checkpointed layers have other bits")
        agreement = _agreement(scores) if {"reference", "nirvana"} <= scores.keys() else None
        more = {"weights_bytes": weights, "same_lowest_fifth": agreement, "headlines": headlines, "failures": failures}
        yield result | more


def run(settings: Settings, name: str = "Llama-3.1-8B", examples: int = EXAMPLES) -> dict[str, Any]:
    *_, document = grow(settings, name, examples)
    return document


def _measure(
    way: str, model: PreTrainedModel, architecture: Architecture, tokens: Tensor, settings: Settings
) -> tuple[Scores, dict[str, float]]:
    """The scores, and the medians of the stages' seconds and of the peak of memory beyond what was there before.

    Raises:
        WrongResultError: ours are not the same bits in every round.
    """
    score, cut = WAYS[way]
    samples: list[dict[str, float]] = []
    before: Scores | None = None
    # The first round is not counted: it compiles kernels and fills the allocator.
    for turn in range(2 if settings.quick else 1 + ROUNDS):
        watch = Stopwatch(settings.device)
        with Peak(settings.device) as peak:
            scores = score(model, tokens, watch)
        if way != "reference" and before is not None and not harness.same_bits(before, scores):
            raise WrongResultError(f"{way}: other bits in round {turn}")
        before = scores
        plan = nirvana.allocate(_portable(scores), architecture, sparsity=SPARSITY)
        kept = {block: torch.tensor(units, device=settings.device) for block, units in plan.kept.items()}
        with watch("slicing"):
            cut(model, architecture, kept)
        seconds = watch.seconds()
        seconds["backward"] = seconds["pass"] - sum(seconds[stage] for stage in ("forward", "objective", "scoring"))
        if turn:
            samples.append({**seconds, "peak": peak.bytes or 0})
    return scores, {key: statistics.median(sample[key] for sample in samples) for key in samples[0]}


def _record(way: str, medians: dict[str, dict[str, float]], weights: int) -> dict[str, Any]:
    mine, before = medians.get(way), medians.get("reference")
    record: dict[str, Any] = {"way": way}
    for stage in ("forward", "objective", "backward", "scoring", "slicing", "pass"):
        record[f"{stage}_ms"] = mine and mine[stage] * 1e3
    record["peak_beyond_weights_bytes"] = mine and mine["peak"]
    record["peak_bytes"] = mine and weights + mine["peak"]
    for stage in ("scoring", "slicing", "pass"):
        record[f"{stage}_times_faster"] = mine and before and before[stage] / mine[stage]
    return record


def _headline(record: dict[str, Any]) -> str:
    if record["pass_ms"] is None:
        return f"{record['way']} -"
    line = f"{record['way']} {record['pass_ms'] / 1e3:.3f} s, peak {record['peak_bytes'] / 1e9:.1f} GB"
    ratio = record["pass_times_faster"]
    return line if ratio is None else f"{line}, x{ratio:.2f}"


def _portable(scores: Scores) -> Scores:
    return {block: values.float().cpu() for block, values in scores.items()}


def _agreement(scores: dict[str, Scores]) -> float:
    """Mean part of the lowest fifth of a block's units that both ways agree on.

    Raises:
        WrongResultError: scores are not finite.
    """
    shares = []
    others = _portable(scores["nirvana"])
    for block, theirs in _portable(scores["reference"]).items():
        mine = others[block]
        if not (torch.isfinite(mine).all() and torch.isfinite(theirs).all()):
            raise WrongResultError(f"the scores of {block} are not finite")
        count = max(1, len(mine) // 5)
        lowest = [set(values.argsort(stable=True)[:count].tolist()) for values in (mine, theirs)]
        shares.append(len(lowest[0] & lowest[1]) / count)
    return statistics.mean(shares)


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--model", default="Llama-3.1-8B")
    parser.add_argument("--examples", type=int, default=EXAMPLES)
    args = parser.parse_args()
    harness.finish(run(harness.settings(args), args.model, args.examples), args.json)


if __name__ == "__main__":
    main()
