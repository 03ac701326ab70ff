"""One candidate of a selection against the published way, each in a process of its own.

The published way, on stock PyTorch: gradients of all parameters at once and full logits; a sliced copy is saved, dense
and sliced model are loaded again, both give their logits of the whole probe, which go to the CPU in fp32, and KL is
made of two log-softmaxes. That is one backward pass, two forward passes, two loads and a save for each candidate.

Ours: one scoring pass and one forward pass of the masked model over the probe; the head's product runs for the dense
hidden states as well. What is paid once for all candidates (the dense model's pass over the probe) stands apart.

    python -m nirvana.benchmarks.selection [--model demo] [--examples 8] [--seq-len 128]

Times start after imports and after the model is loaded. Peak memory is that of the process, imports and model included.
Both ways must come to the same KL. Quick runs take a tiny random model, all in one process.
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
import torch.nn.functional as F
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from nirvana.benchmarks import harness, prune
from nirvana.benchmarks.harness import Settings, WrongResultError
from nirvana.benchmarks.models import random_model
from nirvana.benchmarks.shapes import QUICK
from nirvana.calibration import CalibrationBatch
from nirvana.evaluation.memory import resident_peak
from nirvana.models import resolve
from nirvana.selection import Probe, draw_candidates, select
from nirvana.widths import WidthRule

ROUNDS = 3
EXAMPLES, SEQ_LEN = 8, 128
#: The sparsity at which `prune.straightforward` cuts.
RULE = WidthRule(0.3)


def published(dense: str, calibration: torch.Tensor, probe: torch.Tensor) -> dict[str, float]:
    model = _load(dense)
    with tempfile.TemporaryDirectory() as folder:
        times = prune.straightforward(model, calibration, f"{folder}/out")
        del model  # to its favour: dense, sliced and their parent at once would be three models
        start = time.perf_counter()
        models = [_load(path) for path in (dense, f"{folder}/out")]
        with torch.no_grad():
            logits = [model(input_ids=probe, use_cache=False).logits.float().cpu() for model in models]
        log_p, log_q = (F.log_softmax(each[:, :-1].flatten(0, 1), dim=-1) for each in logits)
        kl = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True).item()
    measured = time.perf_counter() - start
    return {"score_s": times["score"], "kl_s": times["plan_slice_save"] + measured, "once_s": 0.0, "kl": kl}


def ours(dense: str, calibration: torch.Tensor, probe: torch.Tensor) -> dict[str, float]:
    model = _load(dense)
    start = time.perf_counter()
    look = Probe(model, probe)
    once = time.perf_counter() - start
    (candidate,) = select(model, [CalibrationBatch(calibration, {"source": "one"})], look, RULE).candidates
    return {
        "score_s": candidate.score_seconds,
        "kl_s": candidate.probe_seconds,
        "once_s": once,
        "kl": candidate.kl,
    }


WAYS = {"published": published, "nirvana": ours}


def once(way: str, model_name: str, examples: int, seq_len: int) -> dict[str, float]:
    """Seconds of the stages and peak bytes of one candidate in this process."""
    with tempfile.TemporaryDirectory() as folder:
        if model_name == QUICK:
            model = random_model(QUICK, torch.float32, "cpu")
            model.save_pretrained(folder)
            generator = torch.Generator().manual_seed(0)
            both = torch.randint(model.config.vocab_size, (2, examples, seq_len), generator=generator)
            calibration, probe = both
            path = folder
        else:
            source = resolve(model_name)
            sizes = {"num_examples": examples, "seq_len": seq_len}
            drawn = draw_candidates("novels", source.tokenizer(), count=1, **sizes)
            calibration, probe = drawn.batches[0].tokens, drawn.probe.tokens
            path = str(source.folder())
        result = WAYS[way](path, calibration, probe)
    result["total_s"] = result["score_s"] + result["kl_s"]
    result["peak_bytes"] = resident_peak()
    return result


def elsewhere(way: str, model_name: str, examples: int, seq_len: int) -> dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "nirvana.benchmarks.selection", "--way", way, "--model", model_name]
    command += ["--examples", str(examples), "--seq-len", str(seq_len), "--threads", str(torch.get_num_threads())]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    if run.returncode:
        raise RuntimeError(f"one candidate of {model_name} in the way {way!r} failed: {run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def run(
    settings: Settings, model: str = "demo", examples: int = EXAMPLES, seq_len: int = SEQ_LEN, rounds: int = ROUNDS
) -> dict[str, Any]:
    if settings.quick:
        model, examples, seq_len, rounds = QUICK, 2, 16, 1
    else:
        resolve(model)  # one line now, if there is no such model, instead of a failed process
    # The ways take turns, so that a change of the machine's clock hits all.
    samples: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, mine in samples.items():
            mine.append((once if settings.quick else elsewhere)(way, model, examples, seq_len))
    medians = {way: {key: statistics.median(s[key] for s in mine) for key in mine[0]} for way, mine in samples.items()}
    before = medians["published"]
    if abs(medians["nirvana"]["kl"] / before["kl"] - 1) > 1e-3:
        raise WrongResultError(f"KL is {before['kl']} in the published way, {medians['nirvana']['kl']} in ours")
    records = [
        {
            "way": way,
            **mine,
            "times_faster": before["total_s"] / mine["total_s"],
            "times_faster_kl": before["kl_s"] / mine["kl_s"],
            "times_less_memory": before["peak_bytes"] / mine["peak_bytes"],
        }
        for way, mine in medians.items()
    ]
    title = (
        f"one candidate: {model}, {examples} x {seq_len} tokens and as many of the probe, float32, median of {rounds}"
    )
    # Whatever device the kernels are measured on, this job runs on the CPU.
    return harness.document("selection", replace(settings, device="cpu"), [], **{title: records})


def _load(path: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--examples", type=int, default=EXAMPLES)
    parser.add_argument("--seq-len", type=int, default=SEQ_LEN)
    parser.add_argument("--repetitions", type=int, default=ROUNDS, help=f"of each way (default: {ROUNDS})")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    settings = harness.settings(args)
    if args.way:
        print(json.dumps(once(args.way, args.model, args.examples, args.seq_len)))
        return
    harness.finish(run(settings, args.model, args.examples, args.seq_len, args.repetitions), args.json)


if __name__ == "__main__":
    main()
