"""Everything that needs a GPU, in one command: correctness of all backends, then all benchmarks.

    python -m nirvana.benchmarks.gpu [--device cuda] [--out benchmarks/results] [--seconds 450] [--stages kl,slice]

Each stage runs in a process of its own with a limit of time, so that one that fails, hangs or breaks the device does
not take the others with it. Results go to ``OUT/<gpu-name>/``: a JSON file a stage, and results.md. Nothing is
downloaded. Exit code 0 if no stage failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nirvana.benchmarks import correctness, environment, harness, kl, mixture, report, saliency, shapes, slice
from nirvana.benchmarks.harness import Settings
from nirvana.errors import NirvanaError

#: In the order of what matters most, should the time run out.
SWEEP = ["Llama-3.1-8B", "Llama-3.1-70B", "Qwen2.5-7B", "Llama-3.2-1B", "T5-3B"]
SANITIZER = "compute-sanitizer"
#: Seconds after which a process that overstays its own limit is killed.
GRACE = 20


class Stage(NamedTuple):
    """A part of the whole, and how many seconds it may take."""

    run: Callable[[Settings], dict[str, Any]]
    seconds: float


def describe_environment(settings: Settings) -> dict[str, Any]:
    about = environment.describe(settings.device)
    backends = [{"backend": name, "status": status} for name, status in about["backends"].items()]
    return harness.document("environment", settings, [], backends=backends)


def check(settings: Settings) -> dict[str, Any]:
    """Our own pass over all backends, the test suite of the operators, and memcheck."""
    result = correctness.run(settings)
    if not settings.quick:
        more = []
        for name, part in (("tests of the operators", _run_tests), (f"{SANITIZER} memcheck", _run_sanitizer)):
            try:
                more.append({"check": name, "result": part(settings)})
            except RuntimeError as error:
                print(error)
                more.append({"check": name, "result": "failed"})
                result["failures"].append(name)
        result["records"]["more"] = more
    return result


def sweep(settings: Settings) -> dict[str, Any]:
    """group_saliency on every matrix of five models."""
    matrices = shapes.distinct_matrices([shapes.QUICK] if settings.quick else SWEEP)
    if settings.quick:
        matrices = matrices[:2]
    dtypes = ["bfloat16"] if settings.quick else ["bfloat16", "float32"]
    jobs = [job for dtype in dtypes for job in saliency.measure(matrices, [dtype], settings)]
    accuracy = [] if settings.late else saliency.accuracy(settings)
    return harness.document("saliency", settings, jobs, accuracy=accuracy)


def grouped(settings: Settings) -> dict[str, Any]:
    dtypes = ["bfloat16"] if settings.quick else ["bfloat16", "float32"]
    return harness.document("grouped", settings, saliency.measure_grouped(dtypes, settings))


def score(settings: Settings) -> dict[str, Any]:
    from nirvana.benchmarks import scoring

    return scoring.run(settings)


def infer(settings: Settings) -> dict[str, Any]:
    from nirvana.benchmarks import inference

    return inference.run(settings)


STAGES = {
    "environment": Stage(describe_environment, 30),
    "correctness": Stage(check, 150),
    "saliency": Stage(sweep, 100),
    "grouped": Stage(grouped, 40),
    "slice": Stage(lambda settings: slice.run(settings, ["bfloat16", "float32"]), 40),
    "scoring": Stage(score, 80),
    "kl": Stage(lambda settings: kl.run(settings, ["bfloat16", "float32"]), 50),
    "mixture": Stage(mixture.run, 40),
    "inference": Stage(infer, 110),
}


def _run_tests(settings: Settings) -> str:
    """What pytest says in its last line.

    Raises:
        RuntimeError: a test failed.
    """
    files = [str(file) for file in sorted(Path("tests").glob("test_ops*.py"))]
    if not files:
        return "skipped: no tests here, run in the repository"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=_left(settings, 90))
    except subprocess.TimeoutExpired as late:
        # With -x it would have stopped at a failure.
        progress = re.findall(r"\[ *(\d+%)\]", (late.stdout or b"").decode(errors="replace"))
        return f"no failure in its time, which was enough for {progress[-1] if progress else '0%'}"
    if "No module named pytest" in run.stderr:
        return "skipped: pytest is not installed"
    if run.returncode:
        raise RuntimeError(f"tests failed:\n{run.stdout[-3000:]}")
    return run.stdout.strip().splitlines()[-1]


def _run_sanitizer(settings: Settings) -> str:
    """Number of errors that memcheck finds in a small pass.

    Raises:
        RuntimeError: it found some.
    """
    if torch.device(settings.device).type != "cuda":
        return "skipped: not on a GPU"
    if shutil.which(SANITIZER) is None:
        return f"skipped: {SANITIZER} is not on PATH"
    command = [SANITIZER, "--tool", "memcheck", "--error-exitcode", "9", sys.executable]
    command += ["-m", "nirvana.benchmarks.correctness", "--quick", "--device", settings.device]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=_left(settings, 60))
    except subprocess.TimeoutExpired:
        return "not finished in its time"
    if "Device not supported" in run.stdout + run.stderr:
        return "skipped: it does not support this device"
    if run.returncode:
        raise RuntimeError(f"{SANITIZER} found errors:\n{(run.stdout + run.stderr)[-3000:]}")
    return "0 errors"


def _left(settings: Settings, most: float) -> float:
    """Seconds for a part of a stage."""
    if settings.seconds is None:
        return most
    return max(5.0, min(most, settings.started + settings.seconds - time.monotonic()))


def run_here(name: str, settings: Settings, file: Path) -> str:
    """Run a stage in this process; write and show its result.

    Returns:
        "passed", "skipped: ..." or "failed: ...".
    """
    try:
        document = STAGES[name].run(settings)
    except ImportError as reason:
        return f"skipped: {' '.join(str(reason).split())}"
    except Exception as error:
        traceback.print_exc()
        return f"failed: {' '.join(f'{type(error).__name__}: {error}'.split())[:300]}"
    report.show(document)
    report.write(document, file)
    if document.get("failures"):
        return f"failed: {' '.join('; '.join(document['failures']).split())[:300]}"
    return "passed" if document["settings"]["complete"] else "passed, but not all of it in its time"


def run_elsewhere(name: str, settings: Settings, file: Path) -> str:
    """Run a stage in a process of its own, which is killed when it overstays."""
    command = [sys.executable, "-m", "nirvana.benchmarks.gpu", "--stage", name, "--file", str(file)]
    command += ["--device", settings.device, "--rounds", str(settings.rounds), "--seconds", f"{settings.seconds:.0f}"]
    command += ["--quick"] if settings.quick else []
    # A group of its own, so that what the stage has started ends with it.
    process = subprocess.Popen(command, start_new_session=True)
    try:
        code = process.wait(settings.seconds + GRACE)
    except subprocess.TimeoutExpired:
        return f"failed: killed after {settings.seconds + GRACE:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    outcome = file.with_suffix(".outcome")
    if not outcome.is_file():
        return f"failed: exit code {code} without a word"
    text = outcome.read_text()
    outcome.unlink()
    return text


def run(
    settings: Settings, out: Path, names: list[str] | None = None, isolated: bool = True, budget: float = 450
) -> dict[str, str]:
    """Run stages and write their results to ``out/<device-name>/``.

    Returns:
        Stage -> outcome.
    """
    about = environment.describe(settings.device)
    folder = out / re.sub(r"[^a-z0-9]+", "-", about.get("gpu", about["cpu"]).lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    outcomes = {}
    for name in names or STAGES:
        left = budget - (time.monotonic() - start)
        if left < 10:
            outcomes[name] = "failed: no time left"
            continue
        print(f"\n===== {name}", flush=True)
        file = folder / f"{name}.json"
        file.unlink(missing_ok=True)
        mine = replace(settings, seconds=min(STAGES[name].seconds, left), started=time.monotonic())
        began = time.monotonic()
        outcomes[name] = (run_elsewhere if isolated else run_here)(name, mine, file)
        print(f"===== {name}: {outcomes[name]} ({time.monotonic() - began:.0f} s)", flush=True)
    _summarise(folder, outcomes, report.machine(about))
    return outcomes


def _summarise(folder: Path, outcomes: dict[str, str], machine: str) -> None:
    lines = [f"# {machine}\n", "| stage | outcome |", "| --- | --- |"]
    lines += [f"| {name} | {outcome} |" for name, outcome in outcomes.items()]
    parts = ["\n".join(lines) + "\n"]
    for name in outcomes:
        file = folder / f"{name}.json"
        if file.is_file():
            parts.append(report.markdown(json.loads(file.read_text())))
    (folder / "results.md").write_text("\n".join(parts))
    print()
    for name, outcome in outcomes.items():
        print(f"{name:14}{outcome}")
    print(f"\n{folder / 'results.md'}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", default="benchmarks/results", metavar="DIR")
    parser.add_argument("--stages", metavar="NAME,...", help=f"default: {','.join(STAGES)}")
    parser.add_argument("--seconds", type=float, default=450, metavar="S", help="for all stages together")
    parser.add_argument("--rounds", type=int, default=20, metavar="N")
    parser.add_argument("--quick", action="store_true", help="small shapes, all in one process: does it run?")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--file", help=argparse.SUPPRESS)
    args = parser.parse_args()
    try:
        settings = Settings(harness.find_device(args.device), args.rounds, args.quick, args.seconds)
        names = args.stages.split(",") if args.stages else None
        for name in names or []:
            if name not in STAGES:
                raise NirvanaError(f"--stages {name!r} must be of {', '.join(STAGES)}")
    except NirvanaError as error:
        print(f"gpu: {error}", file=sys.stderr)
        return 2
    if args.stage:
        outcome = run_here(args.stage, settings, Path(args.file))
        Path(args.file).with_suffix(".outcome").write_text(outcome)
        return int(outcome.startswith("failed"))
    outcomes = run(settings, Path(args.out), names, isolated=not args.quick, budget=args.seconds)
    return int(any(outcome.startswith("failed") for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
