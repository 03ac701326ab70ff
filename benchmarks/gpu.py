"""Everything that needs a GPU, in two calls that are each useful alone: is it right, and how fast is it?

    python -m nirvana.benchmarks.gpu check     # 200 s at most: build, correctness, tests, sanitizers, a quick pass
    python -m nirvana.benchmarks.gpu measure   # 300 s at most: every benchmark
    python -m nirvana.benchmarks.gpu check measure [--device cuda] [--out benchmarks/results] [--quick]

Run in the repository; nothing is installed or downloaded, the native modules are built in place. Each stage has a
process and a limit of its own; those of a call add up to the call's, and what a stage does not use goes to the later
ones. OUT gets GPU-CALL.json and GPU-CALL.md, and the native modules where it is not in the repository. Exit code 0 if
no stage failed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

from nirvana.benchmarks import runner, tools
from nirvana.benchmarks.runner import Result, Step
from nirvana.benchmarks.summary import Summary
from nirvana.errors import NirvanaError
from nirvana.ops.backends import BACKENDS

#: Seconds of a call for starting up and for the last words.
RESERVE = 8
#: Of the table that is printed last.
LINES = 60
#: Lines of a failed stage's output that are shown.
SHOWN = 15
#: Call -> its seconds, and groups of stages with theirs. Stages of a group run side by side. Those that measure run
#: alone; those in "quick" only show that they run.
QUICK_PASS = ["ceilings", "saliency", "slice", "kl", "scoring", "grouped", "mixture", "inference", "torch.compile"]
CALLS: dict[str, tuple[float, list[dict[str, float]]]] = {
    "check": (
        200,
        [
            {"environment": 40},
            {"triton warm-up": 50, "build": 50},
            {**{f"correctness {backend}": 20 for backend in BACKENDS}, "walks": 20},
            {"memcheck": 50, "racecheck": 50, "tests": 50},
            {f"quick {name}": 32 for name in QUICK_PASS},
        ],
    ),
    "measure": (
        300,
        [
            {"environment": 25},
            {"build": 40},
            {"ceilings": 10},
            {"saliency": 16},
            {"slice": 15},
            {"kl": 24},
            {"scoring": 45},
            {"grouped": 13},
            {"ncu": 24},
            {"mixture": 13},
            {"torch.compile": 25},
            {"real model": 22},
            {"inference": 20},
        ],
    ),
}


class UnusableError(Exception):
    """There is no such device, so that nothing can run."""


def steps(call: str, device: str, rounds: int, quick: bool, stretch: float = 1) -> list[list[Step]]:
    """The groups of a call, their limits times `stretch`."""
    groups: list[list[Step]] = []
    for group in CALLS[call][1]:
        groups.append([])
        for name, seconds in group.items():
            stage = name.removeprefix("quick ")
            task = {"stage": stage, "device": device, "quick": quick or name != stage}
            task["rounds"] = 2 if task["quick"] else rounds
            command = [sys.executable, "-u", "-X", "faulthandler", "-m", "nirvana.benchmarks.stages"]
            groups[-1].append(Step(name, seconds * stretch, command, task))
    return groups


def run(call: str, groups: list[list[Step]], seconds: float, out: Path, workers: int) -> Summary:
    """Run the stages of a call and write its two files after each of them.

    Args:
        seconds: when all has ended.
        workers: stages at a time.
    """
    start = time.monotonic()
    summary = Summary(call, out)

    def keep(result: Result) -> None:
        print(f"{result.name}: {result.outcome} ({result.seconds:.0f} s)"[:200], flush=True)
        # Where the outcome is all that was said, once is enough.
        log = result.log.strip()
        if result.failed and log and log != result.outcome:
            print(*(f"    | {line[:150]}" for line in log.splitlines()[-SHOWN:]), sep="\n", flush=True)
        if result.outcome.startswith(runner.UNUSABLE) and not any(other.document for other in summary.results):
            raise UnusableError(result.outcome.removeprefix(runner.UNUSABLE))
        summary.seconds = time.monotonic() - start
        try:
            summary.add(result)
        except OSError as error:
            # What is printed stays; a full disk is not to end the call.
            print(f"    | cannot write to {out}: {error}"[:200], flush=True)

    runner.run(groups, start + seconds, workers, keep)
    return summary


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("calls", nargs="+", choices=list(CALLS), metavar="CALL", help=f"{' or '.join(CALLS)}, or both")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", default="benchmarks/results", metavar="DIR")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="timed calls of each way (default: 20)")
    parser.add_argument(
        "--quick", action="store_true", help="small shapes, to see that everything runs; always on a CPU"
    )
    parser.add_argument("--stretch", type=float, default=1, metavar="X", help="all limits times X, where cores are few")
    args = parser.parse_args()
    begun = time.monotonic()
    out = Path(args.out)
    workers = max(2, len(os.sched_getaffinity(0)) - 2)
    summaries: list[Summary] = []
    try:
        if args.rounds < 2:
            raise NirvanaError(f"--rounds {args.rounds} must be at least 2")
        if not 0 < args.stretch < 100:
            raise NirvanaError(f"--stretch {args.stretch} must be above 0 and below 100")
        quick = args.quick or _kind(args.device) == "cpu"
        _try_out(out)
        for call in args.calls:
            groups = steps(call, args.device, args.rounds, quick, args.stretch)
            summaries.append(run(call, groups, CALLS[call][0] * args.stretch - RESERVE, out, workers))
    except (NirvanaError, UnusableError) as error:
        print(f"gpu: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"gpu: interrupted; the stages that had ended are in {out}", file=sys.stderr)
        return 130
    try:
        _keep_modules(out)
    except OSError as error:
        print(f"gpu: the native modules were not copied: {error}", file=sys.stderr)
    lines: list[str] = []
    for summary in summaries[:-1]:
        lines += summary.table(0)
    lines += summaries[-1].table(LINES - len(lines) - 1)
    print("", *lines, f"{time.monotonic() - begun:.0f} s in all", sep="\n")
    return 1 if any(summary.failed for summary in summaries) else 0


def _kind(device: str) -> str:
    """Without a look at the GPU, which is for the stages."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise NirvanaError(f"--device {device!r} must be cpu, cuda, cuda:1, ...")
    return kind


def _try_out(out: Path) -> None:
    """Whether results can be written there, before they cost anything.

    Raises:
        NirvanaError: they cannot.
    """
    if out.exists() and not out.is_dir():
        raise NirvanaError(f"--out {out} is not a folder")
    # The nearest folder that is there tells, and nothing is made for a device that is missing.
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise NirvanaError(
            f"--out {out}: nothing can be written in {there} ({error.strerror}); choose another"
        ) from None


def _keep_modules(out: Path) -> None:
    """Copy the native modules beside the results, to look at their machine code later; in the repository they are
    already."""
    if out.resolve().is_relative_to(Path.cwd()):
        return
    for module in tools.built_modules():
        shutil.copy(module, out / module.name)


if __name__ == "__main__":
    raise SystemExit(main())
