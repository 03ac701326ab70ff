"""gather_slice: time against the published boolean mask, index_select, torch.compile and a copy of the same bytes.

python -m nirvana.benchmarks.slice [--dtype float32,bfloat16]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nirvana.benchmarks import ceilings, harness
from nirvana.benchmarks.harness import Job, Settings, Way
from nirvana.ops import gather_slice
from nirvana.ops.backends import choose

#: (rows, columns, axis): the two kinds of matrix in the MLP of an 8B model.
SHAPES = ((14336, 4096, 0), (4096, 14336, 1))
KEPT = (0.5, 0.8)
DTYPE_NAMES = ("float32", "bfloat16")
#: Names of the limits. A new tensor costs the system's making of its pages as well.
NEW, EXISTING = "copy to new memory", "copy to existing memory"


def job(rows: int, columns: int, axis: int, fraction: float, dtype: torch.dtype, settings: Settings) -> Job:
    device = settings.device
    size = (rows, columns)[axis]
    count = int(size * fraction)
    other = rows * columns // size
    # Kept elements read once and written once. Of columns the memory reads more: whole lines of 64 or 128 bytes, in
    # which at least one of 16 or more neighbours is nearly always kept. The limit does not excuse that.
    kept_bytes = count * other * dtype.itemsize
    moved = 2 * kept_bytes

    def make(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(rows, columns, generator=generator).to(dtype).to(device)
        kept = torch.randperm(size, generator=generator)[:count].sort()[0]
        mask = torch.zeros(size, dtype=torch.bool)
        mask[kept] = True
        return weight, kept.to(device), mask.to(device)

    inputs = harness.copies(make, moved, settings)
    out = torch.empty(inputs[0][0].index_select(axis, inputs[0][1]).shape, dtype=dtype, device=device)

    def by_mask(weight: Tensor, kept: Tensor, mask: Tensor) -> Tensor:
        return weight[mask] if axis == 0 else weight[:, mask]

    def selected(weight: Tensor, kept: Tensor, mask: Tensor) -> Tensor:
        return weight.index_select(axis, kept)

    def selected_out(weight: Tensor, kept: Tensor, mask: Tensor) -> Tensor:
        return torch.index_select(weight, axis, kept, out=out)

    def ours(weight: Tensor, kept: Tensor, mask: Tensor) -> Tensor:
        return gather_slice(weight, kept, axis=axis)

    def ours_out(weight: Tensor, kept: Tensor, mask: Tensor) -> Tensor:
        choose(weight.device).gather([weight], kept, axis, 1, [out])
        return out

    fused = harness.compiled(lambda weight, kept: weight.index_select(axis, kept))
    ways = [
        Way("boolean mask, as published", by_mask, NEW),
        Way("index_select", selected, NEW),
        Way("torch.compile", lambda weight, kept, mask: fused(weight, kept), NEW, optional=True),
        *(Way(f"nirvana, {name}", ours, NEW, name) for name in harness.backends(device)),
        Way("index_select, out=", selected_out, EXISTING),
        *(Way(f"nirvana, {name}, kernel alone", ours_out, EXISTING, name) for name in harness.backends(device)),
    ]
    truth = by_mask(*inputs[0])
    limits = {
        NEW: ceilings.copies_to_new_memory(kept_bytes, device),
        EXISTING: ceilings.copies_to_existing_memory(kept_bytes, device),
    }
    return Job(
        f"gather_slice {fraction:.0%} of {'columns' if axis else 'rows'} of {rows}x{columns} {str(dtype)[6:]}",
        moved,
        ways,
        limits,
        inputs,
        lambda way, result, _: harness.assert_equal(way, result, truth),
        eager="boolean mask, as published",
    )


def run(settings: Settings, dtypes: Sequence[str] = DTYPE_NAMES) -> dict[str, Any]:
    shapes, fractions = SHAPES, KEPT
    if settings.quick:
        shapes, fractions, dtypes = [(96, 64, 0), (64, 96, 1)], [0.5], ["bfloat16"]
    jobs = [
        harness.measure(job(*shape, fraction, harness.DTYPES[dtype], settings), settings)
        for shape in shapes
        for fraction in fractions
        for dtype in dtypes
        if not settings.late
    ]
    return harness.document("slice", settings, jobs)


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--dtype", default=",".join(DTYPE_NAMES), metavar="TYPE,...")
    args = parser.parse_args()
    harness.finish(run(harness.settings(args), harness.dtype_names(args.dtype)), args.json)


if __name__ == "__main__":
    main()
