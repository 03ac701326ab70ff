"""The runtimes that `runtimes.py` measures, with one face: read a prompt, then go on greedily, on one thread.

Each is given a checkpoint folder and, where the runtime wants another format, what was exported from it.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

import nirvana
from nirvana.benchmarks.harness import WrongResultError
from nirvana.export.onnx import export_onnx

#: Tokens of text that the runtimes reserve memory for.
CONTEXT = 512


class Runtime(Protocol):
    """What is timed.

    A `decode` of N steps is N passes through the model. `continuation` returns N greedy tokens and the
    log-probabilities that they were chosen from, ``[N, vocabulary]``.
    """

    def prefill(self, prompt: list[int]) -> None: ...

    def decode(self, steps: int) -> None: ...

    def continuation(self, prompt: list[int], steps: int) -> tuple[list[int], Tensor]: ...


class _Stepwise:
    """A runtime that is driven from here, token by token."""

    _logits: Tensor

    def prefill(self, prompt: list[int]) -> None:
        self.forget()
        self._logits = self.forward(prompt)

    def decode(self, steps: int) -> None:
        for _ in range(steps):
            self._logits = self.forward([int(self._logits.argmax())])

    def continuation(self, prompt: list[int], steps: int) -> tuple[list[int], Tensor]:
        self.prefill(prompt)
        rows = []
        for _ in range(steps):
            rows.append(self._logits.log_softmax(-1))
            self.decode(1)
        return [int(row.argmax()) for row in rows], torch.stack(rows)

    def forget(self) -> None:
        """The next token is the first one."""
        raise NotImplementedError

    def forward(self, tokens: list[int]) -> Tensor:
        """Logits of the last one, ``[vocabulary]``."""
        raise NotImplementedError


class Transformers(_Stepwise):
    def __init__(self, checkpoint: str, exported: str | None):
        self._model = nirvana.load(checkpoint, dtype="float32", device="cpu")

    def forget(self) -> None:
        self._past = None

    @torch.inference_mode()
    def forward(self, tokens: list[int]) -> Tensor:
        output = self._model(
            input_ids=torch.tensor([tokens]), past_key_values=self._past, use_cache=True, logits_to_keep=1
        )
        self._past = output.past_key_values
        return output.logits[0, -1]


class OnnxRuntime(_Stepwise):
    def __init__(self, checkpoint: str, exported: str):
        import numpy

        from nirvana.export.onnx.generate import Decoder

        self._numpy = numpy
        self._decoder = Decoder(exported, threads=1)

    def forget(self) -> None:
        self._past, self._length = None, 0

    def forward(self, tokens: list[int]) -> Tensor:
        self._length += len(tokens)
        mask = self._numpy.ones((1, self._length), self._numpy.int64)
        logits, self._past = self._decoder.forward(self._numpy.array([tokens]), mask, self._past, num_logits=1)
        return torch.from_numpy(logits[0, -1])


class LlamaCpp:
    """llama.cpp's own server, in this process."""

    def __init__(self, checkpoint: str, exported: str):
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = exported
        settings.n_ctx, settings.n_parallel, settings.warmup, settings.ui = CONTEXT, 1, False, False
        settings.fit_params, settings.verbosity, settings.cache_ram_mib = False, -1, 0
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
        # Without it values are padded to the widest layer.
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self._server = xllamacpp.Server(settings)
        self._vocabulary = nirvana.models.resolve(checkpoint).config().vocab_size

    def prefill(self, prompt: list[int]) -> None:
        self._prompt = prompt
        self._complete(1, len(prompt))

    def decode(self, steps: int) -> None:
        # The prompt is still there: its last token is computed again and leads to the first one of the answer.
        self._complete(steps, 1, cache_prompt=True)

    def continuation(self, prompt: list[int], steps: int) -> tuple[list[int], Tensor]:
        self._prompt = prompt
        # The server keeps back what ends in the middle of a UTF-8 character: at most three tokens.
        answer = self._complete(steps + 3, len(prompt), n_probs=self._vocabulary)
        made = answer["choices"][0]["logprobs"]["content"][:steps]
        table = torch.full((len(made), self._vocabulary), float("nan"))
        for row, step in enumerate(made):
            for entry in step["top_logprobs"]:
                table[row, entry["id"]] = entry["logprob"]
        return [step["id"] for step in made], table

    def _complete(self, steps: int, computed: int, cache_prompt: bool = False, **more: Any) -> dict[str, Any]:
        request = {"prompt": self._prompt, "n_predict": steps, "temperature": 0.0, "ignore_eos": True}
        answer = self._server.handle_completions({**request, "cache_prompt": cache_prompt, **more})
        if "timings" not in answer:
            raise WrongResultError(f"llama.cpp answers {str(answer)[:300]}")
        done = answer["timings"]
        if (done["prompt_n"], done["predicted_n"]) != (computed, steps):
            raise WrongResultError(f"llama.cpp has not computed {computed} + {steps} tokens but {done}")
        return answer


class Vllm:
    """vLLM's engine in this process, its model not compiled: that takes minutes a model on a CPU."""

    def __init__(self, checkpoint: str, exported: str | None):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        import vllm

        self._sampling = vllm.SamplingParams
        self._engine = vllm.LLM(
            model=checkpoint,
            skip_tokenizer_init=True,
            dtype="float32",
            enforce_eager=True,
            max_model_len=CONTEXT,
            max_num_seqs=1,
            max_num_batched_tokens=CONTEXT,
            max_logprobs=-1,
            kv_cache_memory_bytes=2**28,
            enable_prefix_caching=False,
            async_scheduling=False,
        )
        self._request = 0

    def prefill(self, prompt: list[int]) -> None:
        self._engine.llm_engine.abort_request([str(self._request)])
        self._request += 1
        endless = self._sampling(temperature=0, max_tokens=CONTEXT - len(prompt), ignore_eos=True, detokenize=False)
        self._engine.llm_engine.add_request(str(self._request), {"prompt_token_ids": prompt}, endless)
        self._engine.llm_engine.step()

    def decode(self, steps: int) -> None:
        for _ in range(steps):
            if not self._engine.llm_engine.step():
                raise WrongResultError("vLLM has made no token in a step")

    def continuation(self, prompt: list[int], steps: int) -> tuple[list[int], Tensor]:
        sampling = self._sampling(temperature=0, max_tokens=steps, ignore_eos=True, detokenize=False, logprobs=-1)
        made = self._engine.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)[0].outputs[0]
        table = torch.tensor([[step[token].logprob for token in range(len(step))] for step in made.logprobs])
        return list(made.token_ids), table


class Engine(NamedTuple):
    """A way to run a checkpoint.

    Attributes:
        open: called with the checkpoint and what was exported from it.
        package: what must be importable.
        limit: largest KL divergence of its next token from that of transformers in fp32, in nats. Quantisation to q8_0
            costs 0.01 in a heavily pruned model of 135M parameters; a wrong layer costs whole nats.
        export: called with the checkpoint and the path to make; None where the checkpoint itself is read.
    """

    open: Callable[[str, Any], Runtime]
    package: str
    limit: float
    export: Callable[[str, Path], object] | None = None


def _gguf(kind: str) -> Callable[[str, Path], object]:
    def export(checkpoint: str, out: Path) -> object:
        from nirvana.export.gguf import export_gguf

        return export_gguf(checkpoint, out, type=kind)

    return export


ENGINES = {
    "transformers, fp32": Engine(Transformers, "transformers", 1e-8),
    "llama.cpp, f16": Engine(LlamaCpp, "xllamacpp", 1e-4, _gguf("f16")),
    "llama.cpp, q8_0": Engine(LlamaCpp, "xllamacpp", 5e-2, _gguf("q8_0")),
    "ONNX Runtime, fp32": Engine(OnnxRuntime, "onnxruntime", 1e-8, export_onnx),
    "vLLM, fp32": Engine(Vllm, "vllm", 1e-8),
}


def why_not(name: str) -> str | None:
    """One line if this runtime cannot be measured here."""
    package = ENGINES[name].package
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


@torch.inference_mode()
def divergence(runtime: Runtime, checkpoint: str, prompt: list[int], steps: int) -> float:
    """The largest KL divergence, in nats, of the runtime's next token from that of transformers without a cache, after
    the prompt and after each greedy token."""
    tokens, found = runtime.continuation(prompt, steps)
    if len(tokens) != steps:
        raise WrongResultError(f"{len(tokens)} tokens were made, not {steps}")
    model = nirvana.load(checkpoint, dtype="float32", device="cpu")
    logits = model(input_ids=torch.tensor([prompt + tokens]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    expected = logits.double().log_softmax(-1)
    # Rounded to fp32, probabilities do not quite add up to one, which would be most of the difference.
    found = found.double().log_softmax(-1)
    return float((expected.exp() * (expected - found)).sum(-1).max())
