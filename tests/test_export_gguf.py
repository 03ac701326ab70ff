"""GGUF files in a real llama.cpp against the same model in torch: unequal and equal widths of every decoder family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import CONFIGS, build, random_plan, uniform_plan
from llamacpp import LlamaCpp
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel

import nirvana

pytestmark = pytest.mark.usefixtures("one_thread")

#: More rows than the tokenizer of conftest has tokens: real models have spare rows as well.
VOCABULARY = 416

PROMPT = [5, 77, 131, 9, 300, 42, 255, 18, 64, 399, 12]


def configuration(name: str, **changes) -> PreTrainedConfig:
    """A configuration of tests/families.py for the tokenizer of conftest, attending to everything."""
    settings = CONFIGS[name].to_dict() | {"vocab_size": VOCABULARY, "eos_token_id": 1}
    everything = {"layer_types": None, "use_sliding_window": False, "sliding_window": None}
    settings |= {key: value for key, value in everything.items() if key in settings}
    return type(CONFIGS[name])(**settings | changes)


def write(folder: Path, model: PreTrainedModel, tokenizer, plan=None) -> Path:
    """A checkpoint folder, pruned by `plan`."""
    model.save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    return nirvana.apply_checkpoint(folder / "dense", plan, folder / "small") if plan else folder / "dense"


def partial_characters(folder: Path) -> list[int]:
    """Tokens that are a part of a UTF-8 character."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [token for token in range(len(tokenizer)) if "\ufffd" in tokenizer.decode(token)]


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, prompt: list[int], continuation: list[int]) -> torch.Tensor:
    """Those that lead to each token of the continuation: ``[len(continuation), vocabulary]``, fp32."""
    logits = model(torch.tensor([prompt + continuation]), use_cache=False).logits[0].float()
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def difference(folder: Path, file: Path, prompt: list[int] = PROMPT, count: int = 12) -> float:
    """Largest difference of any log-probability of llama.cpp, prefill and decode, from torch."""
    model = nirvana.load(folder, device="cpu")
    with LlamaCpp(file) as llama:
        tokens, found = llama.distributions(prompt, count, VOCABULARY, never=partial_characters(folder))
    assert len(tokens) == count
    expected = log_probabilities(model, prompt, tokens)
    assert expected.std() > 0.5, "a flat distribution would hide a mistake"
    return (found - expected).abs().max().item()


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.5}

#: Configuration, kept KV groups where widths are equal ("dense": not pruned, None: unequal), changes, architecture.
CASES = [
    ("llama", None, {}, "deci"),  # with llama3 rope scaling
    ("llama", 2, {}, "llama"),
    ("llama", 3, {}, "llama"),  # becomes a mistral checkpoint: 9 heads do not divide 48
    ("llama", "dense", {}, "llama"),
    ("llama-biases", None, {}, "deci"),
    ("llama-biases", 3, {}, "llama"),
    ("llama-tied", None, {}, "deci"),
    ("llama-head-dim", None, {}, "deci"),
    ("llama-head-dim", 2, {"rope_parameters": YARN | {"attention_factor": 1.3}}, "llama"),
    ("mistral", None, {}, "deci"),
    ("mistral", 2, {"rope_parameters": LINEAR}, "llama"),
    ("qwen2", None, {}, "deci"),
    ("qwen2", 2, {}, "llama"),
    ("qwen2", "dense", {"rope_parameters": YARN}, "qwen2"),
    ("qwen2", "dense", {"rope_parameters": CONFIGS["llama"].rope_parameters}, "llama"),
    ("qwen2-tied", None, {}, "deci"),
    ("qwen3", 2, {"attention_bias": False}, "qwen3"),
    ("qwen3-tied", None, {}, "openelm"),
    ("qwen3-tied", None, {"rope_parameters": LINEAR}, "openelm"),
    ("qwen3-tied", 2, {}, "qwen3"),
]


@pytest.mark.parametrize(("name", "groups", "changes", "architecture"), CASES)
def test_log_probabilities_equal_torch(tmp_path, tokenizer, name, groups, changes, architecture):
    model = build(configuration(name, **changes), seed=3)
    plan = None
    if groups != "dense":
        plan = random_plan(model, seed=1) if groups is None else uniform_plan(model, groups, neurons=24, seed=1)
    folder = write(tmp_path, model, tokenizer, plan)
    made = nirvana.export(folder, "gguf", tmp_path / "model.gguf", type="f32")
    assert made.details["architecture"] == architecture
    assert made.notes == ()
    assert difference(folder, made.path) < 2e-5
