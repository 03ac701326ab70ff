"""The whole job (score, plan, slice, save) against the straightforward way, each in a process of its own.

The straightforward way is what the method's published code does, on stock PyTorch: gradients of all parameters at once,
full logits, |gradient x weight| as temporaries the size of each weight, a sliced copy of the model, save_pretrained.
Ours runs twice: with the `torch` backend and with the one that `auto` chooses, which is what the kernels are worth.

    python -m nirvana.benchmarks.prune [--model demo] [--examples 8] [--seq-len 128]

Times start after imports and after the model is loaded. Peak memory is that of the process, imports and model included.
Quick runs prune a tiny random model, all in one process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from typing import Any

import torch
import transformers

import nirvana
from nirvana.benchmarks import harness
from nirvana.benchmarks.harness import Settings
from nirvana.benchmarks.models import random_model
from nirvana.benchmarks.shapes import QUICK
from nirvana.calibration import load_batch
from nirvana.evaluation.memory import resident_peak
from nirvana.models import resolve

ROUNDS = 3
EXAMPLES, SEQ_LEN = 8, 128


def straightforward(model: transformers.PreTrainedModel, tokens: torch.Tensor, out: str) -> dict[str, float]:
    start = time.perf_counter()
    model(input_ids=tokens, use_cache=False).logits.max(dim=1)[0].mean().backward()
    scores = {}
    for block in nirvana.describe(model).blocks:
        total = 0.0
        for part in block.slices:
            weight = model.get_parameter(part.tensor)
            saliency = torch.clone(weight.grad * weight.data).detach().abs_()
            if saliency.dim() == 2:
                saliency = saliency.norm(p=1, dim=1 - part.axis)
            total = total + saliency.view(-1, part.unit).sum(dim=1)
        scores[block.name] = total
    scored = time.perf_counter()
    with harness.forced("torch"):
        small = nirvana.apply(model, nirvana.allocate(scores, model, sparsity=0.3))
    small.save_pretrained(out)
    return {"score": scored - start, "plan_slice_save": time.perf_counter() - scored}


def ours(model: transformers.PreTrainedModel, tokens: torch.Tensor, out: str) -> dict[str, float]:
    start = time.perf_counter()
    scores = nirvana.score(model, tokens)
    scored = time.perf_counter()
    plan = nirvana.allocate(scores, model, sparsity=0.3)
    architecture = nirvana.describe(model)
    sliced = nirvana.slicing.SlicedTensors(nirvana.checkpoint.tensors.ModelTensors(model), architecture, plan)
    nirvana.checkpoint.save.save_checkpoint(out, sliced, plan)
    return {"score": scored - start, "plan_slice_save": time.perf_counter() - scored}


#: Name -> (function, backend).
WAYS = {
    "straightforward": (straightforward, None),
    "nirvana, torch": (ours, "torch"),
    "nirvana, auto": (ours, "auto"),
}


def once(way: str, model_name: str, examples: int, seq_len: int) -> dict[str, float]:
    """Seconds of the stages and peak bytes of one run in this process."""
    if model_name == QUICK:
        model = random_model(QUICK, torch.float32, "cpu")
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(model.config.vocab_size, (examples, seq_len), generator=generator)
    else:
        source = resolve(model_name)
        tokens = load_batch("novels", source.tokenizer(), num_examples=examples, seq_len=seq_len)
        model = source.model("float32", "cpu")
    function, backend = WAYS[way]
    with tempfile.TemporaryDirectory() as folder, harness.forced(backend):
        result = function(model, tokens, f"{folder}/out")
    result["total"] = sum(result.values())
    result["peak_bytes"] = resident_peak()
    return result


def elsewhere(way: str, model_name: str, examples: int, seq_len: int) -> dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "nirvana.benchmarks.prune", "--way", way, "--model", model_name]
    command += ["--examples", str(examples), "--seq-len", str(seq_len), "--threads", str(torch.get_num_threads())]
    environment = {name: value for name, value in os.environ.items() if name != "NIRVANA_BACKEND"}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if run.returncode:
        raise RuntimeError(f"pruning {model_name} in the way {way!r} failed: {run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def run(settings: Settings, model: str = "demo", examples: int = EXAMPLES, seq_len: int = SEQ_LEN) -> dict[str, Any]:
    if settings.quick:
        model, examples, seq_len = QUICK, 2, 16
    else:
        resolve(model)  # one line now, if there is no such model, instead of a failed process
    # The ways take turns, so that a change of the machine's clock hits all.
    samples: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(1 if settings.quick else ROUNDS):
        for way, mine in samples.items():
            mine.append((once if settings.quick else elsewhere)(way, model, examples, seq_len))
    medians = {way: {key: statistics.median(s[key] for s in mine) for key in mine[0]} for way, mine in samples.items()}
    before = medians["straightforward"]
    records = []
    for way, mine in medians.items():
        record: dict[str, Any] = {"way": way}
        for stage in ("score", "plan_slice_save", "total"):
            record[f"{stage}_s"] = mine[stage]
        record["peak_bytes"] = mine["peak_bytes"]
        record["times_faster"] = before["total"] / mine["total"]
        record["times_less_memory"] = before["peak_bytes"] / mine["peak_bytes"]
        records.append(record)
    title = f"{model}, {examples} x {seq_len} tokens, float32, median of {1 if settings.quick else ROUNDS}"
    # Whatever device the kernels are measured on, this job runs on the CPU.
    return harness.document("prune", replace(settings, device="cpu"), [], **{title: records})


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--examples", type=int, default=EXAMPLES)
    parser.add_argument("--seq-len", type=int, default=SEQ_LEN)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    settings = harness.settings(args)
    if args.way:
        print(json.dumps(once(args.way, args.model, args.examples, args.seq_len)))
        return
    harness.finish(run(settings, args.model, args.examples, args.seq_len), args.json)


if __name__ == "__main__":
    main()
