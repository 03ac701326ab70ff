"""Latency and tokens/s of a randomly initialised model, dense and pruned.

    python -m nirvana.benchmarks.inference [--model Llama-3.1-8B]

Weights and saliency are random: the time depends on the shapes alone. The dense model takes turns with each pruned one.
A decoding step is replayed as a CUDA graph where that can be captured, so that it is the device's time and not the
interpreter's; else each step is an ordinary call, and the column `step` says so.
"""

from __future__ import annotations

import gc
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache

import nirvana
from nirvana.benchmarks import harness
from nirvana.benchmarks.harness import Clock, Settings
from nirvana.benchmarks.models import from_config, random_model
from nirvana.benchmarks.shapes import QUICK

#: In the order of what matters most, should the time run out.
SPARSITIES = (0.5, 0.2, 0.4, 0.6)
BATCHES = (1, 8, 32)
#: Tokens of the prompt, and decoded ones.
PROMPT, STEPS = 512, 16
ROUNDS = 5


def pruned_like(model: PreTrainedModel, sparsity: float, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """A model of the shape that pruning leaves, with random weights of its own."""
    saliency = nirvana.score(model, criterion="random")
    plan = nirvana.allocate(saliency, model, sparsity=sparsity)
    return from_config(nirvana.describe(model).pruned_config(plan.kept), dtype, device)


class Runner:
    """Prefill and decoding of one model for one batch size."""

    def __init__(self, model: PreTrainedModel, prompt: Tensor, steps: int):
        self._model, self._prompt, self._steps = model, prompt, steps
        self._token = prompt[:, :1].clone()
        self._graph = None
        self.how = "call"
        if prompt.is_cuda:
            try:
                self._graph = self._captured()
                self.how = "graph"
            except Exception as error:  # whatever a model does that a graph cannot hold
                self.how += f" ({' '.join(str(error).split())[:80]})"
        if self._graph is None:
            self._cache = DynamicCache(config=model.config)
            self._forward(prompt, self._cache)

    def prefill(self) -> None:
        self._forward(self._prompt, DynamicCache(config=self._model.config))

    def decode(self) -> None:
        """`steps` tokens after the prompt."""
        for _ in range(self._steps):
            if self._graph is None:
                self._forward(self._token, self._cache)
            else:
                self._graph.replay()

    def rewind(self) -> None:
        """Back to the end of the prompt."""
        if self._graph is None:
            self._cache.crop(-self._steps)
        else:
            self._rewind_static()

    def _forward(self, tokens: Tensor, cache: Any) -> Tensor:
        return self._model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits

    def _rewind_static(self) -> None:
        for layer in self._cache.layers:
            layer.cumulative_length.fill_(self._prompt.shape[1])

    def _captured(self) -> torch.cuda.CUDAGraph:
        length = self._prompt.shape[1]
        self._cache = StaticCache(config=self._model.config, max_cache_len=length + self._steps + 8)
        self._forward(self._prompt, self._cache)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._forward(self._token, self._cache)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._forward(self._token, self._cache)
        self._rewind_static()
        return graph


@torch.inference_mode()
def compare(models: dict[str, PreTrainedModel], batch: int, prompt_tokens: int, steps: int, settings: Settings) -> list:
    """Records of each model at one batch size; the first is the one that the others are compared with."""
    clock = Clock(settings.device)
    vocabulary = next(iter(models.values())).config.vocab_size
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(vocabulary, (batch, prompt_tokens), generator=generator).to(settings.device)
    runners = {name: Runner(model, prompt, steps) for name, model in models.items()}
    samples: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in models}
    rounds = 2 if settings.quick else ROUNDS
    for turn in range(1 + rounds):
        for name, runner in runners.items():
            seconds = clock.seconds(runner.prefill, ()), clock.seconds(runner.decode, ())
            runner.rewind()
            if turn:
                for kind, value in zip(samples[name], seconds, strict=True):
                    kind.append(value)
    records = []
    first: tuple[float, float] | None = None
    for name, model in models.items():
        prefill, decode = (statistics.median(values) for values in samples[name])
        first = first or (prefill, decode)
        records.append(
            {
                "model": name,
                "batch": batch,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "prefill_ms": prefill * 1e3,
                "prefill_tokens_per_s": batch * prompt_tokens / prefill,
                "prefill_times_faster": first[0] / prefill,
                "decode_ms_per_token": decode / steps * 1e3,
                "decode_tokens_per_s": batch * steps / decode,
                "decode_times_faster": first[1] / decode,
                "step": runners[name].how,
            }
        )
    return records


def grow(settings: Settings, name: str = "Llama-3.1-8B") -> Iterator[dict[str, Any]]:
    """The document, each time that a sparsity has been added."""
    device, dtype = settings.device, torch.bfloat16
    sparsities, batches, prompt, steps = SPARSITIES, BATCHES, PROMPT, STEPS
    if settings.quick:
        name, sparsities, batches, prompt, steps = QUICK, (0.5,), (1, 2), 16, 2
    title = f"{name} {str(dtype)[6:]}, prompt of {prompt} tokens, {steps} decoded"
    dense = random_model(name, dtype, device)
    records: list[dict[str, Any]] = []
    for sparsity in sparsities:
        if settings.late:
            break
        pruned = pruned_like(dense, sparsity, dtype, device)
        for batch in batches:
            label = f"pruned {sparsity:.0%}"
            records += [
                {"beside": label, **record}
                for record in compare({"dense": dense, label: pruned}, batch, prompt, steps, settings)
            ]
        del pruned
        gc.collect()
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()
        headlines = [_headline(record) for record in records if record["model"] != "dense"]
        yield harness.document("inference", settings, [], **{title: records}) | {"headlines": headlines}


def _headline(record: dict[str, Any]) -> str:
    prefill, decode = record["prefill_times_faster"], record["decode_times_faster"]
    return (
        f"{record['model']}, batch {record['batch']}: prompt x{prefill:.2f}, decoding x{decode:.2f} ({record['step']})"
    )


def run(settings: Settings, name: str = "Llama-3.1-8B") -> dict[str, Any]:
    *_, document = grow(settings, name)
    return document


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--model", default="Llama-3.1-8B")
    args = parser.parse_args()
    harness.finish(run(harness.settings(args), args.model), args.json)


if __name__ == "__main__":
    main()
