"""Peak memory of a forward pass, measured in a process of its own.

In the process that pruned, freed memory of other models would be reused and hide what this one needs. Run as a module,
this file is that process: it prints one JSON line.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import torch

from nirvana.errors import NirvanaError


def peak_bytes(model: str | Path, *, tokens: int = 128, dtype: str = "auto", device: str = "auto") -> int:
    """Peak memory in bytes of a fresh process that has loaded `model` and runs one forward pass over 1 x `tokens`.

    On the CPU it is the peak resident set after loading (weights, activations and the libraries themselves); on CUDA
    the peak of what torch allocated on the device.

    Raises:
        NirvanaError: the model cannot be opened.
    """
    command = [sys.executable, "-m", "nirvana.evaluation.memory", str(model), str(tokens), dtype, device]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        reason = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]
        raise NirvanaError(f"the memory of {model} could not be measured: {reason}")
    return json.loads(run.stdout.strip().splitlines()[-1])["peak_bytes"]


def _measure(model_name: str, tokens: int, dtype: str, device: str) -> int:
    from nirvana.architectures.inputs import model_inputs
    from nirvana.models import resolve

    model = resolve(model_name).model(dtype, device)
    arguments = model_inputs(model, torch.zeros(1, tokens, dtype=torch.int64)).arguments
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    _reset_resident_peak()
    with torch.inference_mode():
        model(**arguments)
    return torch.cuda.max_memory_allocated() if cuda else resident_peak()


def _reset_resident_peak() -> None:
    """Forget the peak of loading, where the system can (Linux); elsewhere the peak since the start is reported."""
    if os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def resident_peak() -> int:
    """Most bytes that this process has held. Not ru_maxrss where it can be helped: on Linux that begins at what the
    process held from which this one was started."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    name, length, number_type, place = sys.argv[1:]
    sys.stdout.write(json.dumps({"peak_bytes": _measure(name, int(length), number_type, place)}) + "\n")
