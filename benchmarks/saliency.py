"""group_saliency: time against eager, torch.compile and the limit; error; and the grouped call on a small model.

python -m nirvana.benchmarks.saliency [--shapes 4096x14336,576x1536] [--dtype float32,bfloat16] [--axis 0,1]
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nirvana.benchmarks import ceilings, harness
from nirvana.benchmarks.harness import Job, Settings, Way
from nirvana.benchmarks.shapes import MODELS, QUICK, Matrix
from nirvana.errors import NirvanaError
from nirvana.ops import SaliencyEntry, SaliencyPlan, foreach_group_saliency, group_saliency, plan_group_saliency

SHAPES = ((4096, 14336),)
DTYPE_NAMES = ("float32", "bfloat16")
#: The accuracy of a choice of neurons: how many of the lowest 20 % are not those of float64. The nearer the neurons are
#: to each other (`SPREADS`, of the logarithm of their scale), the more scores tie in 16 bits.
SELECTION_SHAPE, SELECTED, SPREADS = (14336, 4096), 0.2, (0.1, 0.3, 1.0)


def published(weight: Tensor, grad: Tensor, axis: int, group: int) -> Tensor:
    """What the method's published code does."""
    return _grouped(torch.clone(grad * weight).detach().abs_().norm(p=1, dim=1 - axis), group)


def eager(weight: Tensor, grad: Tensor, axis: int, group: int) -> Tensor:
    return _grouped((grad * weight).abs().sum(dim=1 - axis), group)


def accurate(weight: Tensor, grad: Tensor, axis: int, group: int) -> Tensor:
    return _grouped((grad.float() * weight.float()).abs().sum(dim=1 - axis), group)


def exact(weight: Tensor, grad: Tensor, axis: int, group: int) -> Tensor:
    """float64, in blocks: the whole product would take 8 bytes an element."""
    parts = zip(weight.split(512, dim=axis), grad.split(512, dim=axis), strict=True)
    return _grouped(torch.cat([(w.double() * g.double()).abs().sum(dim=1 - axis) for w, g in parts]), group)


def _grouped(sums: Tensor, group: int) -> Tensor:
    return sums if group == 1 else sums.view(-1, group).sum(dim=1)


def draw(
    rows: int, columns: int, dtype: torch.dtype, device: str, seed: int, spread: float = 0.3
) -> tuple[Tensor, Tensor]:
    """A weight, and a gradient whose rows and columns differ in scale (lognormal) as those of trained models do."""
    generator = torch.Generator(device).manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator, device=device)
    grad = torch.randn(rows, columns, generator=generator, device=device)
    grad *= torch.randn(rows, 1, generator=generator, device=device).mul_(spread).exp_()
    grad *= torch.randn(1, columns, generator=generator, device=device).mul_(spread).exp_()
    return weight.to(dtype), grad.to(dtype)


def job(matrix: Matrix, dtype: torch.dtype, settings: Settings) -> Job:
    """All ways for one matrix."""
    rows, columns, axis, group = matrix.rows, matrix.columns, matrix.axis, matrix.group
    device = settings.device
    # W and G read once, the sums written once.
    moved = 2 * rows * columns * dtype.itemsize + 4 * (rows, columns)[axis] // group
    inputs = harness.copies(lambda seed: draw(rows, columns, dtype, device, seed), moved, settings)
    buffer = torch.empty(rows, columns, dtype=dtype, device=device)
    sums = torch.empty((rows, columns)[axis], dtype=dtype, device=device)

    def with_buffers(weight: Tensor, grad: Tensor) -> Tensor:
        torch.mul(grad, weight, out=buffer).abs_()
        return _grouped(torch.sum(buffer, dim=1 - axis, out=sums), group)

    fixed = {"axis": axis, "group": group}
    terms = rows * columns // (rows, columns)[axis] * group
    native, single = harness.tolerance(dtype, terms), harness.tolerance(torch.float32, terms)
    ways = [
        Way("eager, as published", functools.partial(published, **fixed), "read", tolerance=native),
        Way("eager", functools.partial(eager, **fixed), "read", tolerance=native),
        Way("eager, buffers allocated before", with_buffers, "read", tolerance=native),
    ]
    if dtype != torch.float32:
        ways.append(Way("eager, fp32 sums", functools.partial(accurate, **fixed), "read", tolerance=single))
    fused = harness.compiled(lambda weight, grad: accurate(weight, grad, axis, group))
    ways.append(Way("torch.compile", fused, "read", optional=True, tolerance=single))
    ours = functools.partial(group_saliency, **fixed)
    for name in harness.backends(device):
        ways.append(Way(f"nirvana, {name}", ours, "read", name, tolerance=harness.PRECISE))
    limits = {"read": ceilings.reads(2, device)}
    if torch.device(device).type == "cuda":
        # What data sheets and other projects count by: half of the bytes read, half written.
        limits["copy"] = ceilings.copies_to_existing_memory(inputs[0][0].nbytes, device)
    truth = exact(*inputs[0], axis, group)
    return Job(
        f"group_saliency {matrix.name}{rows}x{columns} {str(dtype)[6:]}, {('rows', 'columns')[axis]}"
        + (f" in groups of {group}" if group > 1 else ""),
        moved,
        ways,
        limits,
        inputs,
        lambda way, result, _: harness.assert_close(way, result, truth),
    )


def grouped_job(name: str, dtype: torch.dtype, settings: Settings) -> Job:
    """Every matrix of a small model, one call against a call each. Matrices of a block share their scores."""
    model = MODELS[name]
    device = settings.device
    matrices = model.layer_matrices() * (1 if settings.quick else model.layers)
    units = [(m.rows, m.columns)[m.axis] // m.group for m in matrices]
    # One vector holds the scores of all matrices, so that clearing it is one launch in every way.
    scores = torch.zeros(sum(units), device=device)
    outs = list(scores.split(units))
    # W and G of every matrix read once, the sums read and written once.
    moved = sum(2 * m.rows * m.columns * dtype.itemsize + 8 * n for m, n in zip(matrices, units, strict=True))
    pairs = [draw(m.rows, m.columns, dtype, device, seed) for seed, m in enumerate(matrices)]
    entries = [
        SaliencyEntry(weight, grad, m.axis, m.group, out)
        for (weight, grad), m, out in zip(pairs, matrices, outs, strict=True)
    ]

    def loop_of(reduce: Any) -> Any:
        def call(*_: Tensor) -> Tensor:
            scores.zero_()
            for weight, grad, axis, group, out in entries:
                out += reduce(weight, grad, axis, group)
            return scores

        return call

    def loop(*_: Tensor) -> Tensor:
        scores.zero_()
        for weight, grad, axis, group, out in entries:
            group_saliency(weight, grad, axis=axis, group=group, out=out)
        return scores

    def foreach(*_: Tensor) -> Tensor:
        scores.zero_()
        foreach_group_saliency(entries)
        return scores

    def planned() -> Any:
        # Made at the first call, which is not timed: a plan is of the backend that serves when it is made.
        plans: list[SaliencyPlan] = []

        def call(*_: Tensor) -> Tensor:
            if not plans:
                plans.append(plan_group_saliency(entries))
            scores.zero_()
            plans[0]()
            return scores

        return call

    terms = max(m.rows * m.columns // n for m, n in zip(matrices, units, strict=True))
    native, single = harness.tolerance(dtype, terms), harness.tolerance(torch.float32, terms)
    ways = [
        Way("eager, as published", loop_of(published), "read", tolerance=native),
        Way("eager", loop_of(eager), "read", tolerance=native),
        Way("torch.compile", loop_of(harness.compiled(accurate)), "read", optional=True, tolerance=single),
    ]
    for backend in harness.backends(device):
        ways.append(Way(f"nirvana, {backend}, a call each", loop, "read", backend, tolerance=harness.PRECISE))
        ways.append(Way(f"nirvana, {backend}, one call", foreach, "read", backend, tolerance=harness.PRECISE))
        ways.append(Way(f"nirvana, {backend}, planned", planned(), "read", backend, tolerance=harness.PRECISE))
    tensors = [tensor for pair in pairs for tensor in pair]
    truth = torch.cat([exact(e.weight, e.grad, e.axis, e.group) for e in entries])
    return Job(
        f"{len(matrices)} matrices of {name} {str(dtype)[6:]}",
        moved,
        ways,
        {"read": ceilings.reads(len(tensors), device)},
        [tuple(tensors)],
        lambda way, result, _: harness.assert_close(way, result, truth),
    )


def accuracy(settings: Settings) -> list[dict[str, Any]]:
    """Largest error against float64, and neurons that are chosen wrongly where the lowest 20 % go."""
    rows, columns = (192, 64) if settings.quick else SELECTION_SHAPE
    records = []
    for dtype, spread in ((torch.float32, SPREADS[0]), *((torch.bfloat16, spread) for spread in SPREADS)):
        weight, grad = draw(rows, columns, dtype, settings.device, 0, spread)
        truth = exact(weight, grad, 0, 1)
        count = int(rows * SELECTED)
        right = set(truth.argsort(stable=True)[:count].tolist())
        results = {"eager": eager(weight, grad, 0, 1), "eager, fp32 sums": accurate(weight, grad, 0, 1)}
        for name in harness.backends(settings.device):
            with harness.forced(name):
                results[f"nirvana, {name}"] = group_saliency(weight, grad, axis=0, group=1)
        for way, result in results.items():
            chosen = set(result.double().argsort(stable=True)[:count].tolist())
            records.append(
                {
                    "job": f"{rows}x{columns} {str(dtype)[6:]} rows, spread {spread}",
                    "way": way,
                    "largest_relative_error": harness.relative_error(result, truth),
                    "distinct_scores": len(result.unique()),
                    "neurons_chosen": count,
                    "chosen_wrongly": len(right - chosen),
                }
            )
    return records


def run(
    settings: Settings,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    dtypes: Sequence[str] = DTYPE_NAMES,
    axes: Sequence[int] = (0, 1),
) -> dict[str, Any]:
    if settings.quick:
        shapes, dtypes = [(96, 64)], ["bfloat16"]
    matrices = [Matrix("", rows, columns, axis, 1) for rows, columns in shapes for axis in axes]
    jobs = measure(matrices, dtypes, settings) + measure_grouped(dtypes, settings)
    return harness.document("saliency", settings, jobs, accuracy=accuracy(settings))


def measure(matrices: Sequence[Matrix], dtypes: Sequence[str], settings: Settings) -> list[dict[str, Any]]:
    """The jobs of every matrix and type, as far as the time allows."""
    return [
        harness.measure(job(matrix, harness.DTYPES[dtype], settings), settings)
        for matrix in matrices
        for dtype in dtypes
        if not settings.late
    ]


def measure_grouped(dtypes: Sequence[str], settings: Settings) -> list[dict[str, Any]]:
    name = QUICK if settings.quick else "SmolLM2-135M"
    return [
        harness.measure(grouped_job(name, harness.DTYPES[dtype], settings), settings)
        for dtype in dtypes
        if not settings.late
    ]


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--shapes", default="4096x14336", metavar="RxC,...", help="default: 4096x14336")
    parser.add_argument("--dtype", default=",".join(DTYPE_NAMES), metavar="TYPE,...")
    parser.add_argument("--axis", default="0,1", metavar="0|1|0,1", help="0 sums over columns, 1 over rows")
    args = parser.parse_args()
    try:
        shapes = [(int(rows), int(columns)) for rows, columns in (s.split("x") for s in args.shapes.split(","))]
        axes = [("0", "1").index(axis) for axis in args.axis.split(",")]
    except ValueError as error:
        raise NirvanaError(f"--shapes {args.shapes} --axis {args.axis}: {error}") from None
    harness.finish(run(harness.settings(args), shapes, harness.dtype_names(args.dtype), axes), args.json)


if __name__ == "__main__":
    main()
