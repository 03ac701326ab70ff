"""What masking costs: an MLP's output projection with and without zeroed input channels.

python -m nirvana.benchmarks.masking

Why there is no fused `masked_linear_input`: the masked model (`nirvana.masking`) multiplies the input of o_proj and
down_proj by 0 or 1. A kernel that fuses this into the matrix product could save no more than the difference of the
first two rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from nirvana.benchmarks import harness
from nirvana.benchmarks.harness import Job, Settings, Way

#: (tokens, neurons, hidden): down_proj of an 8B model, and of SmolLM2-135M.
SHAPES = ((512, 14336, 4096), (512, 1536, 576))


def job(tokens: int, neurons: int, hidden: int, settings: Settings) -> Job:
    # Input and weight read once, output written once, fp32. The matrix product computes for longer than that takes.
    moved = 4 * (tokens * neurons + neurons * hidden + tokens * hidden)

    def make(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(tokens, neurons, generator=generator)
        weight = torch.randn(hidden, neurons, generator=generator)
        keep = (torch.rand(neurons, generator=generator) < 0.8).float()
        return tuple(tensor.to(settings.device) for tensor in (x, weight, keep))

    inputs = [make(0)]
    x, weight, keep = inputs[0]
    masked, dense = linear(x.double() * keep, weight.double()), linear(x.double(), weight.double())
    scale = float(masked.abs().max())

    def check(way: Way, result: Tensor, _: tuple) -> None:
        exact = dense if way.name == "linear, nothing masked" else masked
        # Single elements cancel to nearly zero: errors are measured against the largest.
        error = float((result.double() - exact).abs().max()) / scale
        if not error < 1e-5:
            raise harness.WrongResultError(f"{way.name} is wrong: error {error:.2g} of the largest element")

    fused = harness.compiled(lambda x, weight, keep: linear(x * keep, weight))
    ways = [
        Way("multiply by the mask, linear", lambda x, weight, keep: linear(x * keep, weight)),
        Way("linear, nothing masked", lambda x, weight, keep: linear(x, weight)),
        Way("torch.compile", lambda x, weight, keep: fused(x, weight, keep), optional=True),
    ]
    name = f"masked linear {tokens}x{neurons}x{hidden} float32"
    return Job(name, moved, ways, {}, inputs, check, eager="multiply by the mask, linear")


def run(settings: Settings) -> dict[str, Any]:
    shapes = [(8, 48, 16)] if settings.quick else SHAPES
    jobs = [harness.measure(job(*shape, settings), settings) for shape in shapes if not settings.late]
    return harness.document("masking", settings, jobs)


def main() -> None:
    args = harness.parser(__doc__).parse_args()
    harness.finish(run(harness.settings(args)), args.json)


if __name__ == "__main__":
    main()
