"""Time of one forward pass, two models side by side."""

from __future__ import annotations

import statistics
import time

import torch
from transformers import PreTrainedModel

from nirvana.architectures.inputs import model_inputs

WARM_UP, RUNS = 2, 11


@torch.inference_mode()
def forward_seconds(models: list[PreTrainedModel], tokens: int = 128) -> list[float]:
    """Median seconds of a forward pass over 1 x `tokens` random token ids, for each model.

    The models take turns, so that a change of the machine's clock hits all of them; median of 11 after 2 unmeasured.
    """
    times: list[list[float]] = [[] for _ in models]
    ids = torch.randint(
        min(m.config.vocab_size for m in models), (1, tokens), generator=torch.Generator().manual_seed(0)
    )
    batches = [model_inputs(model, ids).arguments for model in models]
    for run in range(WARM_UP + RUNS):
        for model, arguments, mine in zip(models, batches, times, strict=True):
            _synchronise(model)
            start = time.perf_counter()
            model(**arguments)
            _synchronise(model)
            if run >= WARM_UP:
                mine.append(time.perf_counter() - start)
    return [statistics.median(mine) for mine in times]


def _synchronise(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
