"""How much faster pruned models are in the runtimes that people serve with: prompt and decoding, on one thread.

    python -m nirvana.benchmarks.runtimes [--model demo] [--work DIR] [--vllm-python .venv-vllm/bin/python]

The model is pruned to several sparsities (one scoring, then a plan each), exported, and run in transformers, llama.cpp,
ONNX Runtime and vLLM, each checkpoint in a process of its own. A runtime must give the next-token probabilities of
transformers before it is timed. The processes of a runtime take turns, and what counts is the CPU time of the process:
the wall clock of a shared machine says less. Runtimes that are not installed are named and left out; vLLM is looked for
in the Python that --vllm-python names, because it wants an environment of its own.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import transformers

import nirvana
from nirvana.benchmarks import harness
from nirvana.benchmarks.engines import ENGINES, why_not
from nirvana.benchmarks.harness import Settings, WrongResultError
from nirvana.benchmarks.turns import Elsewhere, FailedError, Job, Measurement
from nirvana.calibration import load_batch, read_documents, token_ids
from nirvana.calibration.corpora import EVALUATION
from nirvana.errors import NirvanaError
from nirvana.models import resolve

SPARSITIES = (0.0, 0.2, 0.4, 0.5, 0.6)
#: Tokens of the prompt, and decoded ones.
PROMPT, STEPS = 128, 32
ROUNDS = 5
#: Widths are multiples of this: q8_0 quantises blocks of 32 numbers.
ALIGN = 32
#: Processes that prepare something side by side. Nothing is timed meanwhile.
WORKERS = 2
VLLM = "vLLM, fp32"


def prepare(model: str, sparsities: tuple[float, ...], folder: Path, quick: bool) -> tuple[dict, list[dict[str, Any]]]:
    """Sparsity -> checkpoint folder, and what is left of the model in each. What `folder` holds already is taken."""
    source = resolve(model)
    paths = {0.0: str(source.folder())}
    architecture = source.architecture()
    records = [{"pruned": "0%", "prunable_parameters": architecture.prunable_parameters}]
    records[0] |= {"parameters": architecture.parameters, "distinct_widths": 1}
    scores = None
    for sparsity in filter(None, sparsities):
        path = folder / f"pruned-{sparsity}"
        paths[sparsity] = str(path)
        if not path.is_dir():
            if scores is None:
                tokens = load_batch("novels", source.tokenizer(), num_examples=2 if quick else 8, seq_len=128)
                dense = source.model("float32", "cpu")
                scores = nirvana.score(dense, tokens)
            plan = nirvana.allocate(scores, dense, sparsity=sparsity, align=8 if quick else ALIGN)
            nirvana.apply_checkpoint(model, plan, path)
        plan = nirvana.PruningPlan.load(path)
        pairs = {tuple(len(plan.kept[b.name]) for b in layer) for layer in _layers(architecture)}
        records.append(
            {
                "pruned": f"{sparsity:.0%}",
                "prunable_parameters": plan.totals["prunable_after"],
                "parameters": plan.totals["parameters_after"],
                "distinct_widths": len(pairs),
            }
        )
    return paths, records


def _layers(architecture: nirvana.architectures.Architecture) -> list[tuple]:
    """Attention and MLP of each layer."""
    attention = [block for block in architecture.blocks if block.is_attention]
    return list(zip(attention, (block for block in architecture.blocks if not block.is_attention), strict=True))


def export(engine: str, checkpoint: str, out: str) -> None:
    """In a process of the pool: one thread, because there are several of them."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    ENGINES[engine].export(checkpoint, Path(out))


def exports(engines: list[str], checkpoints: dict[float, str], folder: Path, quick: bool) -> dict[tuple, str]:
    """(engine, sparsity) -> file or folder, made side by side."""
    made = {}
    with contextlib.ExitStack() as stack:
        pool = None
        if not quick:
            context = multiprocessing.get_context("spawn")
            pool = stack.enter_context(ProcessPoolExecutor(WORKERS, mp_context=context))
        waiting = []
        for engine in engines:
            for sparsity, checkpoint in checkpoints.items():
                if ENGINES[engine].export is None:
                    continue
                suffix = ".gguf" if "llama.cpp" in engine else ""
                out = folder / f"{''.join(c if c.isalnum() else '-' for c in engine)}-{sparsity}{suffix}"
                made[engine, sparsity] = str(out)
                if out.exists():
                    continue
                if pool is None:
                    export(engine, checkpoint, str(out))
                else:
                    waiting.append(pool.submit(export, engine, checkpoint, str(out)))
        for task in waiting:
            task.result()
    return made


def measure(engine: str, jobs: dict[float, Job], rounds: int, quick: bool, python: str | None) -> dict[str, Any]:
    """CPU seconds and checks of one runtime; its processes, one a checkpoint, take turns."""
    with contextlib.ExitStack() as stack:
        if quick:
            ways: dict[float, Any] = {sparsity: Measurement(job) for sparsity, job in jobs.items()}
            for way in ways.values():
                stack.callback(way.close)
        else:
            ways = dict(zip(jobs, _opened(jobs, stack, python), strict=True))
        samples: dict[float, list[tuple[float, float]]] = {sparsity: [] for sparsity in ways}
        for turn in range(1 + rounds):
            for sparsity, way in ways.items():
                seconds = way.seconds()
                if turn:  # the first is to warm up
                    samples[sparsity].append(seconds)
        return {
            sparsity: {
                "prefill_ms_per_token": [s[0] / len(jobs[sparsity].prompt) * 1e3 for s in mine],
                "decode_ms_per_token": [s[1] / jobs[sparsity].steps * 1e3 for s in mine],
                "divergence": ways[sparsity].divergence,
            }
            for sparsity, mine in samples.items()
        }


def _opened(jobs: dict[float, Job], stack: contextlib.ExitStack, python: str | None) -> list[Elsewhere]:
    def start(job: Job) -> Elsewhere:
        way = Elsewhere(job, python) if python else Elsewhere(job)
        stack.callback(way.close)
        way.wait()
        return way

    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(start, jobs.values()))


def run(
    settings: Settings,
    model: str = "demo",
    engines: tuple[str, ...] = tuple(ENGINES),
    work: str | None = None,
    vllm_python: str | None = None,
) -> dict[str, Any]:
    quick = settings.quick
    sparsities = (0.0, 0.5) if quick else SPARSITIES
    prompt_tokens, steps, rounds = (16, 2, 2) if quick else (PROMPT, STEPS, ROUNDS)
    skipped = {name: reason for name in engines if (reason := _reason(name, vllm_python))}
    names = [name for name in engines if name not in skipped]
    with contextlib.ExitStack() as stack:
        folder = Path(work or stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        source = resolve(model)
        checkpoints, sizes = prepare(model, sparsities, folder, quick)
        # A text that is in no calibration corpus.
        prompt = token_ids(source.tokenizer(), read_documents(EVALUATION)[0][:20000])[200 : 200 + prompt_tokens]
        files = exports(names, checkpoints, folder, quick)
        results, failed = {}, {}
        for name in names:
            if settings.late:
                break
            jobs = {s: Job(name, path, files.get((name, s)), prompt, steps) for s, path in checkpoints.items()}
            try:
                results[name] = measure(name, jobs, rounds, quick, vllm_python if name == VLLM else None)
            except (FailedError, WrongResultError) as error:
                # The others are still worth knowing; `main` ends with an error.
                failed[name] = str(error).splitlines()[-1]
    tables: dict[str, list[dict[str, Any]]] = {f"{model}, widths in multiples of {8 if quick else ALIGN}": sizes}
    tables[f"prompt of {prompt_tokens} tokens, CPU time of dense / pruned"] = _ratios(results, "prefill_ms_per_token")
    tables[f"decoding {steps} tokens, CPU time of dense / pruned"] = _ratios(results, "decode_ms_per_token")
    tables["check: nats from transformers"] = _rows(results, lambda mine, dense: mine["divergence"])
    tables["not measured"] = [{"runtime": name, "why": why} for name, why in (skipped | failed).items()]
    document = harness.document("runtimes", replace(settings, device="cpu", rounds=rounds), [], **tables)
    document["environment"] |= {"threads": 1, "runtimes": _versions(names, vllm_python)}
    document["failed"] = failed
    # Milliseconds hold for this machine alone: they are kept, not shown.
    document["samples"] = {name: {f"{s:.0%}": mine for s, mine in result.items()} for name, result in results.items()}
    return document


def _reason(name: str, vllm_python: str | None) -> str | None:
    if name == VLLM and vllm_python:
        return None
    return why_not(name) + ("; see --vllm-python" if name == VLLM else "") if why_not(name) else None


def _ratios(results: dict[str, Any], key: str) -> list[dict[str, Any]]:
    return _rows(results, lambda mine, dense: statistics.median(dense[key]) / statistics.median(mine[key]))


def _rows(results: dict[str, Any], figure: Any) -> list[dict[str, Any]]:
    """A row a runtime, a column a sparsity."""
    return [
        {"runtime": name, **{f"{sparsity:.0%}": figure(mine, result[0.0]) for sparsity, mine in result.items()}}
        for name, result in results.items()
    ]


def _versions(names: list[str], vllm_python: str | None) -> dict[str, str]:
    found = {}
    for package in {ENGINES[name].package for name in names}:
        if package == "vllm" and vllm_python:
            code = "import vllm; print(vllm.__version__)"
            run = subprocess.run([vllm_python, "-c", code], capture_output=True, text=True, check=True)
            found[package] = run.stdout.split()[-1]
            continue
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--model", default="demo", help="a decoder with a tokenizer (default: demo)")
    parser.add_argument("--runtimes", metavar="NAMES", help=f"separated by ';' (default: {'; '.join(ENGINES)})")
    parser.add_argument("--work", metavar="DIR", help="keep checkpoints and exports there, and use what it holds")
    parser.add_argument("--vllm-python", metavar="FILE", help="Python of an environment with vLLM")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    names = tuple(name.strip() for name in args.runtimes.split(";")) if args.runtimes else tuple(ENGINES)
    for name in names:
        if name not in ENGINES:
            raise NirvanaError(f"--runtimes {name!r} must be among {'; '.join(ENGINES)}")
    document = run(harness.settings(args), args.model, names, args.work, args.vllm_python)
    harness.finish(document, args.json)
    if document["failed"]:
        sys.exit(f"failed: {'; '.join(document['failed'])}")


if __name__ == "__main__":
    main()
