"""A real llama.cpp (PyPI package xllamacpp) that opens a GGUF file and answers with probabilities or over HTTP."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import torch
from torch import Tensor

xllamacpp = pytest.importorskip("xllamacpp")


class LlamaCpp:
    """llama.cpp's server in this process, on a free port of this machine, until `close`.

    Args:
        path: the GGUF file.
        context: tokens that it can hold.
        exact: fp32 key/value cache without flash attention, whose fp16 would hide small differences; False takes
            llama.cpp's defaults.
        threads: of prefill and decode.
    """

    def __init__(self, path: Path, context: int = 128, exact: bool = True, threads: int = 1):
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.warmup, params.ui = context, 1, False, False
        params.fit_params, params.verbosity, params.cache_ram_mib = False, -1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        if exact:
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._server = xllamacpp.Server(params)
        self.address = self._server.listening_address

    def complete(self, prompt: str | Sequence[int], count: int, probabilities: int, **more: Any) -> dict[str, Any]:
        """Greedy continuation by `count` tokens, in the form of OpenAI's completions, with llama.cpp's timings."""
        request = {"prompt": prompt, "n_predict": count, "n_probs": probabilities, "temperature": 0.0}
        result = self._server.handle_completions({**request, "cache_prompt": False, **more})
        assert "choices" in result, result
        return result

    def distributions(
        self, prompt: Sequence[int], count: int, vocabulary: int, never: Sequence[int] = ()
    ) -> tuple[list[int], Tensor]:
        """The greedy continuation and the log-probabilities that led to each of its tokens: ``[count, vocabulary]``.

        Tokens of `never` are not chosen. The server leaves out every step that ends in the middle of a UTF-8 character.
        """
        barred = [[token, False] for token in never]
        result = self.complete(list(prompt), count, vocabulary, ignore_eos=True, logit_bias=barred)
        steps = result["choices"][0]["logprobs"]["content"]
        table = torch.full((len(steps), vocabulary), float("nan"))
        for row, step in enumerate(steps):
            for entry in step["top_logprobs"]:
                table[row, entry["id"]] = entry["logprob"]
        return [step["id"] for step in steps], table

    def score(self, prompt: str, text: str) -> tuple[list[int], Tensor]:
        """The tokens of `text` after `prompt`, forced by a grammar, and the log-probability of each."""
        grammar = f"root ::= {json.dumps(text)}"
        steps = self.complete(prompt, len(text), 1, grammar=grammar)["choices"][0]["logprobs"]["content"]
        steps = [step for step in steps if step["bytes"]]
        return [step["id"] for step in steps], torch.tensor([step["logprob"] for step in steps])

    def tokenize(self, text: str, special: bool = True) -> list[int]:
        return self._post("/tokenize", {"content": text, "add_special": special, "parse_special": True})["tokens"]

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = Request(self.address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def close(self) -> None:
        del self._server

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
