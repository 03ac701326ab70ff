"""Every backend on the device against float64 on odd shapes, and twice for the same bits: a small pass that also runs
where pytest is missing, and under compute-sanitizer.

    python -m nirvana.benchmarks.correctness [--device cuda] [--quick] [--backend triton] [--part 0/14]
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from nirvana.benchmarks import harness, kl, mixture, saliency
from nirvana.benchmarks.gaussians import Found, agreement
from nirvana.benchmarks.harness import Settings, Way, WrongResultError
from nirvana.errors import NirvanaError
from nirvana.ops import (
    SaliencyEntry,
    foreach_group_saliency,
    gather_slice,
    group_saliency,
    kl_divergence,
    mixture_bounds,
    plan_group_saliency,
)

#: (rows, columns, group): one, odd, longer than a tile in either direction, and of ordinary size.
SHAPES = ((1, 1, 1), (15, 37, 1), (255, 513, 1), (3, 4099, 1), (4099, 3, 1), (384, 1024, 64), (1024, 2048, 1))
QUICK_SHAPES = SHAPES[1:3]
#: (tokens, vocabulary): so few tokens that a vocabulary is computed in parts, and the first number that is not.
FEW_TOKENS = ((1, 20_011), (263, 8200), (264, 8200))
#: (units, length): below a step, odd, an MLP of 135 million and of 8 billion parameters, and longer.
MIXTURES = ((40, 7), (40, 513), (200, 1728), (40, 12_288), (2, 70_001))
QUICK_MIXTURES = ((10, 7), (10, 67))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def checks(settings: Settings) -> Iterator[tuple[str, Callable[[Way], None]]]:
    """Name and check; a check is called inside `use_backend` and raises WrongResultError."""
    device = settings.device
    shapes = QUICK_SHAPES if settings.quick else SHAPES
    for (rows, columns, group), dtype, axis in itertools.product(shapes, DTYPES, (0, 1)):
        if (rows, columns)[axis] % group == 0:
            arguments = rows, columns, group, axis, dtype, device
            yield f"group_saliency {arguments}", functools.partial(_saliency, *arguments)
            yield f"gather_slice {arguments}", functools.partial(_gather, *arguments)
    for (tokens, vocabulary, _), dtype in itertools.product(shapes, DTYPES):
        yield f"kl_divergence {tokens, vocabulary, dtype}", functools.partial(_kl, tokens, vocabulary, dtype, device)
    for (tokens, vocabulary), dtype in itertools.product(FEW_TOKENS[:1] if settings.quick else FEW_TOKENS, DTYPES):
        yield f"kl_divergence {tokens, vocabulary, dtype}", functools.partial(_kl, tokens, vocabulary, dtype, device)
    for units, length in QUICK_MIXTURES if settings.quick else MIXTURES:
        yield f"mixture_bounds {units, length}", functools.partial(_mixture, units, length, device)
    yield "foreach_group_saliency", functools.partial(_foreach, shapes, device)
    yield "plan_group_saliency", functools.partial(_plan, shapes, device)
    # Without its caching allocator torch asks the driver for memory, which a capture does not allow.
    if torch.device(device).type == "cuda" and "PYTORCH_NO_CUDA_MEMORY_CACHING" not in os.environ:
        yield "CUDA graph", functools.partial(_captured, shapes, device)


def run(settings: Settings, backends: Sequence[str] | None = None, part: tuple[int, int] = (0, 1)) -> dict[str, Any]:
    """A record for each backend; those that fail are named under ``failures``.

    Args:
        backends: of those that are here; None is all.
        part: (i, n) does every n-th check from the i-th on.
    """
    records, failures = [], []
    for backend in backends or harness.backends(settings.device):
        count, result = 0, "passed"
        for name, check in itertools.islice(checks(settings), part[0], None, part[1]):
            try:
                with harness.forced(backend):
                    check(Way(f"{backend}: {name}", check, backend=backend, tolerance=harness.PRECISE))
            except Exception as error:
                result = f"{type(error).__name__}: {error}"
                failures.append(f"{backend}: {name}: {result}")
                break
            count += 1
        records.append({"backend": backend, "checks_passed": count, "result": result})
    headlines = [f"{record['backend']}: {record['checks_passed']} checks passed" for record in records]
    result = harness.document("correctness", settings, [], backends=records)
    return result | {"failures": failures, "headlines": headlines}


def _saliency(rows: int, columns: int, group: int, axis: int, dtype: torch.dtype, device: str, way: Way) -> None:
    weight, grad = saliency.draw(rows, columns, dtype, device, 0)
    first, second = (group_saliency(weight, grad, axis=axis, group=group) for _ in range(2))
    harness.assert_close(way, first, saliency.exact(weight, grad, axis, group))
    _assert_same(way, first, second)


def _entries(shapes: tuple, device: str, seed: int) -> list[SaliencyEntry]:
    """A reduction of each shape and type, each to zeros of its own."""
    entries = []
    for (rows, columns, group), dtype in itertools.product(shapes, DTYPES):
        weight, grad = saliency.draw(rows, columns, dtype, device, seed)
        axis = 0 if rows % group == 0 else 1
        out = torch.zeros((rows, columns)[axis] // group, device=device)
        entries.append(SaliencyEntry(weight, grad, axis, group, out))
    return entries


def _alone(entry: SaliencyEntry) -> Tensor:
    return group_saliency(entry.weight, entry.grad, axis=entry.axis, group=entry.group)


def _foreach(shapes: tuple, device: str, way: Way) -> None:
    """One call for everything has the bits of a call each."""
    entries = _entries(shapes, device, 1)
    foreach_group_saliency(entries)
    for entry in entries:
        _assert_same(way, entry.out, _alone(entry))


def _plan(shapes: tuple, device: str, way: Way) -> None:
    """So has a plan, again and again, and with other gradients."""
    entries = _entries(shapes, device, 2)
    plan = plan_group_saliency(entries)
    others = [
        other._replace(weight=entry.weight, out=entry.out)
        for entry, other in zip(entries, _entries(shapes, device, 3), strict=True)
    ]
    for now, run in ((entries, plan), (entries, plan), (others, lambda: plan([other.grad for other in others]))):
        for entry in now:
            entry.out.zero_()
        run()
        for entry in now:
            _assert_same(way, entry.out, _alone(entry))


def _captured(shapes: tuple, device: str, way: Way) -> None:
    """A CUDA graph replays a call of one matrix, a plan, a gather and a divergence; a table is refused."""
    entries = _entries(shapes, device, 4)
    plan, single = plan_group_saliency(entries), entries[-1]
    kept = torch.arange(0, single.weight.shape[0], 2, device=device)
    logits = [torch.randn(3, 20_011, device=device) for _ in range(2)]

    def work() -> tuple[Tensor, ...]:
        plan()
        return _alone(single), gather_slice(single.weight, kept, axis=0, unit=1), kl_divergence(*logits)

    expected = work()  # also compiles and loads the kernels, which a capture does not allow
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = work()
        try:
            foreach_group_saliency(entries)
        except NirvanaError:
            refused = True
        else:
            refused = way.backend == "torch"  # which has no table
    if not refused:
        raise WrongResultError(f"{way.name} does not refuse a table")
    for _ in range(2):
        for entry in entries:
            entry.out.zero_()
        for one in found:
            one.zero_()
        graph.replay()
        for entry in entries:
            _assert_same(way, entry.out, _alone(entry))
        for one, other in zip(found, expected, strict=True):
            _assert_same(way, one, other)


def _gather(rows: int, columns: int, group: int, axis: int, dtype: torch.dtype, device: str, way: Way) -> None:
    weight = torch.randn(rows, columns, device=device).to(dtype)
    units = (rows, columns)[axis] // group
    kept = torch.randperm(units, generator=torch.Generator().manual_seed(0))[: (units + 1) // 2].sort()[0].to(device)
    index = (kept[:, None] * group + torch.arange(group, device=device)).flatten()
    harness.assert_equal(way, gather_slice(weight, kept, axis=axis, unit=group), weight.index_select(axis, index))


def _kl(tokens: int, vocabulary: int, dtype: torch.dtype, device: str, way: Way) -> None:
    p, q = kl.draw(tokens, vocabulary, dtype, device, 0)
    first, second = kl_divergence(p, q), kl_divergence(p, q)
    error = float((first.double() - kl.exact(p, q)).abs().max())
    if not error <= 1e-5:  # nats; of one or two words KL may be 0, so no relative error
        raise WrongResultError(f"{way.name} is wrong by {error:.2g} nats against float64")
    _assert_same(way, first, second)


def _mixture(units: int, length: int, device: str, way: Way) -> None:
    """As the reference on all rows but one in 20, which may stop a step apart; NaN where a score is not finite."""
    scores = mixture.random_scores(units, length).to(device)
    scores[0, -1] = torch.inf
    first, second = mixture_bounds(scores), mixture_bounds(scores)
    with harness.forced("torch"):
        exact = mixture_bounds(scores)
    if not first.low[0].isnan() or not first.high[0].isnan() or first.components[0] != 0:
        raise WrongResultError(f"{way.name} gives bounds of scores that are not finite")
    ours, theirs = (Found(type(found)(*(part[1:] for part in found))) for found in (first, exact))
    share = agreement(ours, theirs, scores[1:])["agree"]
    if share < mixture.AGREEMENT:
        raise WrongResultError(f"{way.name} agrees with the reference on {share:.0%} of the rows")
    for one, other in zip(first, second, strict=True):
        _assert_same(way, one[1:], other[1:])


def _assert_same(way: Way, first: Tensor, second: Tensor) -> None:
    if not torch.equal(first, second):
        raise WrongResultError(f"{way.name} gives other bits the second time")


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--backend", metavar="NAME,...", help="default: all that serve the device")
    parser.add_argument("--part", default="0/1", metavar="I/N", help="every N-th check, from the I-th on")
    args = parser.parse_args()
    first, step = map(int, args.part.split("/"))
    result = run(harness.settings(args), args.backend.split(",") if args.backend else None, (first, step))
    harness.finish(result, args.json)
    if result["failures"]:
        raise SystemExit("\n".join(result["failures"]))


if __name__ == "__main__":
    main()
