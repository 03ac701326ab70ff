"""The whole job (score, plan, slice, save) against the straightforward way, each in a process of its own.

The straightforward way is what the method's published code does, on stock PyTorch: gradients of all parameters at once,
full logits, |gradient x weight| as temporaries the size of each weight, a sliced copy of the model, save_pretrained.

    python benchmarks/prune.py [--model demo] [--examples 8] [--seq-len 128] [--json FILE]

Times start after imports and after the model is loaded. Peak memory is that of the process, imports and model included.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

import nirvana
from nirvana.calibration import load_batch
from nirvana.models import resolve

RUNS = 3


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
    small = nirvana.apply(model, nirvana.allocate(scores, model, sparsity=0.3))
    small.save_pretrained(out)
    return {"score": scored - start, "plan, slice, save": time.perf_counter() - scored}


def ours(model: transformers.PreTrainedModel, tokens: torch.Tensor, out: str) -> dict[str, float]:
    start = time.perf_counter()
    scores = nirvana.score(model, tokens)
    scored = time.perf_counter()
    plan = nirvana.allocate(scores, model, sparsity=0.3)
    architecture = nirvana.describe(model)
    sliced = nirvana.slicing.SlicedTensors(nirvana.checkpoint.tensors.ModelTensors(model), architecture, plan)
    nirvana.checkpoint.save.save_checkpoint(out, sliced, plan)
    return {"score": scored - start, "plan, slice, save": time.perf_counter() - scored}


WAYS = {"straightforward": straightforward, "nirvana": ours}


def measure(way: str, model_name: str, examples: int, seq_len: int) -> dict[str, float]:
    source = resolve(model_name)
    tokens = load_batch("novels", source.tokenizer(), num_examples=examples, seq_len=seq_len)
    model = source.model("float32", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        result = WAYS[way](model, tokens, f"{folder}/out")
    result["total"] = sum(result.values())
    result["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if args.way:
        print(json.dumps(measure(args.way, args.model, args.examples, args.seq_len)))
        return
    # The ways take turns, so that a change of the machine's clock hits both.
    samples: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(RUNS):
        for way, mine in samples.items():
            command = [sys.executable, __file__, "--way", way, "--model", args.model]
            command += ["--examples", str(args.examples), "--seq-len", str(args.seq_len)]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            mine.append(json.loads(run.stdout.splitlines()[-1]))
    figures = {way: {key: statistics.median(s[key] for s in mine) for key in mine[0]} for way, mine in samples.items()}
    size = f"{args.examples} x {args.seq_len} tokens"
    print(f"{args.model}, {size}, float32, {torch.get_num_threads()} threads, median of {RUNS}")
    print(f"{'':20}{'straightforward':>18}{'nirvana':>12}{'ratio':>8}")
    for key in figures["nirvana"]:
        before, after = figures["straightforward"][key], figures["nirvana"][key]
        shown = [f"{v / 1e9:.2f} GB" if key == "peak_bytes" else f"{v:.1f} s" for v in (before, after)]
        print(f"{key.replace('peak_bytes', 'peak memory'):20}{shown[0]:>18}{shown[1]:>12}{before / after:>7.1f}x")
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
