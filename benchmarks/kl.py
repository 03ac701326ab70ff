"""kl_divergence: time and memory against eager and torch.compile; and the form from hidden states.

python -m nirvana.benchmarks.kl [--dtype float32,bfloat16]
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nirvana.benchmarks import ceilings, harness, peak
from nirvana.benchmarks.harness import Job, Settings, Way
from nirvana.ops import kl_divergence, linear_kl_divergence

#: (tokens, vocabulary): SmolLM2 and Llama 3.
SHAPES = ((512, 49152), (128, 128256))
QUICK_SHAPES = ((8, 300),)
#: (tokens, features, vocabulary) of two heads.
LINEAR_SHAPE, QUICK_LINEAR_SHAPE = (512, 576, 49152), (8, 16, 300)
DTYPE_NAMES = ("float32", "bfloat16")
#: All of fp32 in eager code too: nobody compares models in bf16 log-probabilities.
TOLERANCE = 1e-3


def eager(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    log_p = torch.log_softmax(logits_p.float(), dim=-1)
    log_q = torch.log_softmax(logits_q.float(), dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def eager_kl_div(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    log_p = torch.log_softmax(logits_p.float(), dim=-1)
    log_q = torch.log_softmax(logits_q.float(), dim=-1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(dim=-1)


def exact(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """float64, a few tokens at a time."""
    parts = zip(logits_p.split(16), logits_q.split(16), strict=True)
    return torch.cat([_exact(p.double(), q.double()) for p, q in parts])


def _exact(p: Tensor, q: Tensor) -> Tensor:
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def draw(tokens: int, vocabulary: int, dtype: torch.dtype, device: str, seed: int) -> tuple[Tensor, Tensor]:
    """Logits of a model and of its pruned self: alike, but not close."""
    generator = torch.Generator(device).manual_seed(seed)
    p = torch.randn(tokens, vocabulary, generator=generator, device=device).mul_(2)
    q = torch.randn(tokens, vocabulary, generator=generator, device=device).add_(p)
    return p.to(dtype), q.to(dtype)


def ways_of(device: str) -> list[Way]:
    return [
        Way("eager", eager, "read", tolerance=TOLERANCE),
        Way("eager, F.kl_div", eager_kl_div, "read", tolerance=TOLERANCE),
        Way("torch.compile", harness.compiled(eager), "read", optional=True, tolerance=TOLERANCE),
        *(
            Way(f"nirvana, {name}", kl_divergence, "read", name, tolerance=TOLERANCE)
            for name in harness.backends(device)
        ),
    ]


def job(tokens: int, vocabulary: int, dtype: torch.dtype, settings: Settings) -> Job:
    device = settings.device
    # Both logits read once, the result written once.
    moved = 2 * tokens * vocabulary * dtype.itemsize + 4 * tokens
    inputs = harness.copies(lambda seed: draw(tokens, vocabulary, dtype, device, seed), moved, settings)
    truth = exact(*inputs[0])
    return Job(
        f"kl_divergence {tokens}x{vocabulary} {str(dtype)[6:]}",
        moved,
        ways_of(device),
        {"read": ceilings.reads(2, device)},
        inputs,
        lambda way, result, _: harness.assert_close(way, result, truth),
    )


def draw_heads(
    tokens: int, features: int, vocabulary: int, dtype: torch.dtype, device: str, seed: int
) -> tuple[Tensor, ...]:
    """(hidden_p, weight_p, hidden_q, weight_q)."""
    generator = torch.Generator(device).manual_seed(seed)
    hidden = torch.randn(tokens, features, generator=generator, device=device)
    weight = torch.randn(vocabulary, features, generator=generator, device=device).mul_(2 / features**0.5)
    other = torch.randn(tokens, features, generator=generator, device=device).mul_(0.5).add_(hidden)
    return hidden.to(dtype), weight.to(dtype), other.to(dtype), weight.to(dtype, copy=True)


def eager_heads(hidden_p: Tensor, weight_p: Tensor, hidden_q: Tensor, weight_q: Tensor) -> Tensor:
    return eager(F.linear(hidden_p, weight_p), F.linear(hidden_q, weight_q))


def heads_ways(dtype: torch.dtype, device: str) -> list[Way]:
    # Logits are rounded to the type of the hidden states by the product itself, in every way: in bf16 a single one is
    # off by up to 2^-8 of its size, which KL averages over the vocabulary.
    allowed = TOLERANCE if dtype == torch.float32 else 3e-2
    compiled = harness.compiled(eager_heads)
    return [
        Way("eager", eager_heads, tolerance=allowed),
        Way("torch.compile", compiled, optional=True, tolerance=allowed),
        *(Way(f"nirvana, {n}", linear_kl_divergence, backend=n, tolerance=allowed) for n in harness.backends(device)),
    ]


def heads_job(tokens: int, features: int, vocabulary: int, dtype: torch.dtype, settings: Settings) -> Job:
    # Hidden states and weights of both heads read once. The products bound this job (4 x tokens x features x vocabulary
    # operations), so no ceiling of bytes is shown.
    moved = 2 * (tokens + vocabulary) * features * dtype.itemsize + 4 * tokens
    inputs = harness.copies(
        lambda seed: draw_heads(tokens, features, vocabulary, dtype, settings.device, seed), moved, settings
    )
    hidden_p, weight_p, hidden_q, weight_q = inputs[0]
    parts = zip(hidden_p.split(16), hidden_q.split(16), strict=True)
    wide_p, wide_q = weight_p.double(), weight_q.double()
    truth = torch.cat([_exact(p.double() @ wide_p.T, q.double() @ wide_q.T) for p, q in parts])
    del wide_p, wide_q
    return Job(
        f"linear_kl_divergence {tokens}x{features}x{vocabulary} {str(dtype)[6:]}",
        moved,
        heads_ways(dtype, settings.device),
        {},
        inputs,
        lambda way, result, _: harness.assert_close(way, result, truth),
    )


def memory(settings: Settings, dtypes: Sequence[str]) -> list[dict[str, Any]]:
    """Peak additional memory of each way."""
    # What a process on a CPU has in memory is muddied by whatever it did before.
    isolated = torch.device(settings.device).type == "cpu" and not settings.quick
    records = []
    for kind, dtype in [*(("logits", dtype) for dtype in dtypes), ("heads", dtypes[0])]:
        shape = _memory_shape(kind, settings.quick)
        for way in _memory_ways(kind, harness.DTYPES[dtype], settings.device):
            records.append(
                {
                    "job": f"{'linear_' if kind == 'heads' else ''}kl_divergence {'x'.join(map(str, shape))} {dtype}",
                    "way": way.name,
                    "peak_bytes": (_peak_elsewhere if isolated else _peak)(kind, way.name, dtype, settings),
                    # What eager code makes several times.
                    "fp32_logits_bytes": 4 * shape[0] * shape[-1],
                }
            )
    return records


def _memory_shape(kind: str, quick: bool) -> tuple[int, ...]:
    if kind == "heads":
        return QUICK_LINEAR_SHAPE if quick else LINEAR_SHAPE
    return (QUICK_SHAPES if quick else SHAPES)[0]


def _memory_ways(kind: str, dtype: torch.dtype, device: str) -> list[Way]:
    return heads_ways(dtype, device) if kind == "heads" else ways_of(device)


def _peak(kind: str, name: str, dtype: str, settings: Settings) -> int | None:
    make: Callable[..., tuple] = draw_heads if kind == "heads" else draw
    inputs = make(*_memory_shape(kind, settings.quick), harness.DTYPES[dtype], settings.device, 0)
    ways = _memory_ways(kind, harness.DTYPES[dtype], settings.device)
    way = next(way for way in ways if way.name == name)
    try:
        with harness.forced(way.backend):
            return peak.additional_bytes(lambda: way.call(*inputs), settings.device)
    except Exception:
        if not way.optional:
            raise
        return None


def _peak_elsewhere(kind: str, name: str, dtype: str, settings: Settings) -> int | None:
    command = [sys.executable, "-m", "nirvana.benchmarks.kl", "--device", settings.device, "--dtype", dtype]
    command += ["--threads", str(torch.get_num_threads()), "--peak", f"{kind}:{name}"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"the memory of {name!r} could not be measured: {run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def run(settings: Settings, dtypes: Sequence[str] = DTYPE_NAMES) -> dict[str, Any]:
    shapes = QUICK_SHAPES if settings.quick else SHAPES
    if settings.quick:
        dtypes = ["bfloat16"]
    heads = QUICK_LINEAR_SHAPE if settings.quick else LINEAR_SHAPE
    jobs = [
        harness.measure(job(*shape, harness.DTYPES[dtype], settings), settings)
        for shape in shapes
        for dtype in dtypes
        if not settings.late
    ]
    jobs += [
        harness.measure(heads_job(*heads, harness.DTYPES[dtype], settings), settings)
        for dtype in dtypes
        if not settings.late
    ]
    return harness.document("kl", settings, jobs, peak_additional_memory=memory(settings, dtypes))


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--dtype", default=",".join(DTYPE_NAMES), metavar="TYPE,...")
    parser.add_argument("--peak", metavar="KIND:WAY", help="print the peak additional memory of one way alone")
    args = parser.parse_args()
    settings, dtypes = harness.settings(args), harness.dtype_names(args.dtype)
    if args.peak:
        kind, name = args.peak.split(":")
        print(json.dumps(_peak(kind, name, dtypes[0], settings)))
        return
    harness.finish(run(settings, dtypes), args.json)


if __name__ == "__main__":
    main()
