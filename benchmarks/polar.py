"""The polar factor of features: eigenvectors of the Gram matrix, which nirvana takes, SVD and Newton-Schulz.

python -m nirvana.benchmarks.polar [--rounds 20] [--json FILE]

Matrices are made of orthonormal vectors and chosen singular values, so the polar factor is known. The values fall
evenly in the logarithm: in "even" to a half of the largest, in "spread" to 1e-4. The smallest of what layers of
SmolLM2-135M hand on for 128 tokens of a novel is 4e-4 to 7e-3 of the largest.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from nirvana.benchmarks import harness
from nirvana.benchmarks.harness import Job, Settings, Way
from nirvana.saliency.afr import polar_factor

#: (tokens, hidden).
SHAPES = ((128, 576), (1024, 576), (4096, 576))
QUICK_SHAPES = ((5, 12), (24, 12))
#: Name -> smallest singular value, of a largest of 1.
SPECTRA = {"even": 0.5, "spread": 1e-4}
#: Of Newton-Schulz, which ends before when a step changes no more than four roundings.
MOST_STEPS = 100


def by_svd(x: Tensor, truth: Tensor) -> Tensor:
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    return u @ v


def newton_schulz(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, int]:
    """X <- 3/2 X - 1/2 X X^T X until it stands still, and how many steps that took.

    A singular value s of a largest of 1 needs about log(1/s) / log(1.5) steps to grow, and some more to settle.
    """
    tall = x.shape[0] > x.shape[1]
    x = (x.T if tall else x).to(dtype)
    x = x / x.norm()
    change, steps = math.inf, 0
    while change > 4 * torch.finfo(dtype).eps and steps < MOST_STEPS:
        new = 1.5 * x - 0.5 * (x @ x.T) @ x
        change = float((new - x).norm() / new.norm())
        x, steps = new, steps + 1
    return (x.T if tall else x), steps


def draw(tokens: int, hidden: int, smallest: float, settings: Settings, seed: int) -> tuple[Tensor, Tensor]:
    """A matrix and its polar factor, float64."""
    generator = torch.Generator().manual_seed(seed)
    count = min(tokens, hidden)
    u, v = (
        torch.linalg.qr(torch.randn(size, count, generator=generator, dtype=torch.float64))[0]
        for size in (tokens, hidden)
    )
    values = torch.logspace(0, torch.tensor(smallest).log10().item(), count, dtype=torch.float64)
    return tuple(each.to(settings.device) for each in ((u * values) @ v.T, u @ v.T))


def job(tokens: int, hidden: int, spectrum: str, settings: Settings) -> tuple[Job, list[dict[str, Any]]]:
    errors: list[dict[str, Any]] = []
    name = f"polar factor {tokens}x{hidden} {spectrum}"
    x, truth = draw(tokens, hidden, SPECTRA[spectrum], settings, 0)

    def check(way: Way, result: Tensor, inputs: tuple[Tensor, Tensor]) -> None:
        error = float((result.double() - inputs[1]).norm() / inputs[1].norm())
        dtype = {"Newton-Schulz, float64": torch.float64, "Newton-Schulz, float32": torch.float32}.get(way.name)
        steps = newton_schulz(inputs[0], dtype)[1] if dtype else None
        errors.append({"job": name, "way": way.name, "relative_error": error, "steps": steps})
        if not error <= way.tolerance:
            raise harness.WrongResultError(f"{way.name}: relative error {error:.2g}, {way.tolerance:.2g} allowed")

    # float32 rounds x itself, which turns the smallest directions by the rounding over their singular value.
    ways = [
        Way("nirvana, Gram eigenvectors", lambda x, truth: polar_factor(x), tolerance=1e-6),
        Way("torch.linalg.svd", by_svd, tolerance=1e-10),
        Way("Newton-Schulz, float64", lambda x, truth: newton_schulz(x, torch.float64)[0], tolerance=1e-10),
        Way("Newton-Schulz, float32", lambda x, truth: newton_schulz(x, torch.float32)[0], tolerance=3e-2),
    ]
    moved = 2 * x.numel() * x.element_size()
    return Job(name, moved, ways, {}, [(x, truth)], check, eager="torch.linalg.svd"), errors


def run(settings: Settings) -> dict[str, Any]:
    jobs, errors = [], []
    for tokens, hidden in QUICK_SHAPES if settings.quick else SHAPES:
        for spectrum in SPECTRA:
            if settings.late:
                continue
            work, found = job(tokens, hidden, spectrum, settings)
            jobs.append(harness.measure(work, settings))
            errors += found
    return harness.document("polar", settings, jobs, error=errors)


def main() -> None:
    args = harness.parser(__doc__).parse_args()
    harness.finish(run(harness.settings(args)), args.json)


if __name__ == "__main__":
    main()
