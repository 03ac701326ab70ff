"""vLLM in this process, and what it says about a prompt. Importing this skips the test file where vLLM is missing."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

pytest.importorskip("vllm", reason="vLLM is not installed; run: make test-vllm", exc_type=ImportError)

# The engine in this process instead of one of its own, so that tests see its model and its cache.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
# Functions, not only strings, may be sent to the worker.
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

#: Short, repetitive, and longer than the sliding windows of the test models.
PROMPTS = ([5, 9, 33, 2, 71], [8] * 20 + [3, 4], list(range(3, 40)))
LENGTH = 24
CACHE_BYTES = 2**24


def ask(model: str | Path, *questions: Callable[[LLM], Any], **settings) -> list[Any]:
    """The answers of an engine that reads and makes token ids, in fp32.

    The engine ends here: one that is freed later would take the process groups of the next one along.
    """
    defaults = {
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 128,
        "max_num_seqs": 4,
        "kv_cache_memory_bytes": CACHE_BYTES,
    }
    llm = LLM(model=str(model), **(defaults | settings))
    try:
        return [question(llm) for question in questions]
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def answers(llm: LLM) -> tuple[list[list[int]], torch.Tensor]:
    """Greedy tokens after each prompt, and the log-probability of every prompt token but the first."""
    sampling = SamplingParams(temperature=0, max_tokens=LENGTH, prompt_logprobs=0, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], sampling, use_tqdm=False)
    scores = [
        place[token].logprob
        for output, prompt in zip(outputs, PROMPTS, strict=True)
        for place, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)
    ]
    return [list(output.outputs[0].token_ids) for output in outputs], torch.tensor(scores)


@torch.no_grad()
def expected_answers(model: PreTrainedModel) -> tuple[list[list[int]], torch.Tensor]:
    """What `answers` must be, from transformers."""
    tokens, scores = [], []
    for prompt in PROMPTS:
        rows = torch.tensor([prompt])
        made = model.generate(rows, max_new_tokens=LENGTH, do_sample=False, eos_token_id=None)
        tokens.append(made[0, len(prompt) :].tolist())
        logprobs = model(rows).logits[0, :-1].log_softmax(-1)
        scores.append(logprobs.gather(1, rows[0, 1:, None])[:, 0])
    return tokens, torch.cat(scores)


def cache_shapes(llm: LLM) -> list[tuple[int, ...]]:
    """Of every layer: blocks, key/value heads, tokens a block, keys and values of a head."""
    return llm.collective_rpc(lambda worker: [tuple(cache.shape) for cache in worker.model_runner.kv_caches])[0]


def class_name(llm: LLM) -> str:
    return llm.apply_model(lambda model: f"{type(model).__module__}.{type(model).__name__}")[0]
