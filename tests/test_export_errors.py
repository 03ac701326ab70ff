"""What `nirvana export` refuses: what llama.cpp would compute wrongly, and bad input. One line, nothing written."""

from __future__ import annotations

import json
import resource
import shutil
import sys
from pathlib import Path

import pytest
import torch
from families import CONFIGS, build, random_plan
from safetensors.torch import load_file, save_file

import nirvana

ROWS = 416


def checkpoint(folder: Path, tokenizer, name: str, unequal: bool = False, **changes) -> Path:
    """A checkpoint of tests/families.py with a tokenizer, whose config.json says `changes` as well."""
    settings = CONFIGS[name].to_dict() | {"vocab_size": ROWS}
    settings.pop("per_layer_config", None)
    model = build(type(CONFIGS[name])(**settings), seed=0)
    model.save_pretrained(folder / "dense")
    tokenizer.save_pretrained(folder / "dense")
    path = folder / "dense"
    if unequal:
        path = nirvana.apply_checkpoint(path, random_plan(model, seed=1), folder / "small")
    if changes:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | changes))
    return path


@pytest.fixture
def refuse(cli_here, tmp_path):
    """``refuse(*arguments, says=...)``: exit code 2, one line that holds every string of `says`, no file appears."""

    def check(*arguments: object, says: tuple[str, ...]) -> None:
        before = sorted(tmp_path.rglob("*"))
        code, stdout, stderr = cli_here("export", *arguments)
        assert (code, stdout) == (2, "")
        assert stderr.startswith("nirvana export: ")
        assert stderr.count("\n") == 1
        for part in says:
            assert part in stderr
        assert sorted(tmp_path.rglob("*")) == before

    return check


ROPE = {"rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64}

#: Configuration, unequal widths, changes to config.json, options, what the line says.
MODELS = [
    ("t5", False, {}, (), ("decoder", "t5", "transformers")),
    ("qwen3", True, {}, (), ("Qwen3", "--allocation uniform", "--format onnx")),
    ("qwen3", False, {}, (), ("attention_bias", "--format onnx")),
    ("mistral", True, {}, (), ("8 tokens", "sliding window", "--context-length 8")),
    ("qwen2", False, {}, (), ("8 tokens", "sliding window", "--context-length 8")),
    ("mistral", True, {}, ("--context-length", 9), ("8 tokens", "sliding window")),
    ("llama", True, {}, ("--context-length", 129), ("129", "128")),
    ("llama", True, {}, ("--context-length", 0), ("0", "128")),
    ("llama-tied", False, {"hidden_act": "gelu"}, (), ("silu", "gelu")),
    ("llama-tied", False, {"intermediate_size": 0}, (), ("0 units",)),
    ("llama", False, {"rope_parameters": ROPE | {"rope_type": "dynamic"}}, (), ("'dynamic'", "--format onnx")),
    ("llama", False, {"rope_parameters": ROPE | {"rope_type": "yarn", "beta_fast": 16}}, (), ("beta_fast", "32")),
    ("qwen3-tied", True, {"rope_parameters": CONFIGS["llama"].rope_parameters}, (), ("'llama3'", "openelm")),
    (
        "qwen2",
        True,
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        ("--context-length", 8),
        ("quantised",),
    ),
]


@pytest.mark.parametrize(("name", "unequal", "changes", "options", "says"), MODELS)
def test_models_that_llama_cpp_would_compute_wrongly(
    refuse, tmp_path, tokenizer, name, unequal, changes, options, says
):
    path = checkpoint(tmp_path, tokenizer, name, unequal, **changes)
    refuse(path, "--format", "gguf", "--out", tmp_path / "x.gguf", *options, says=says)


GGUF = ("--format", "gguf")
OPTIONS = [
    (("--format", "tflite"), ("'tflite'", "gguf, onnx")),
    ((*GGUF, "--type", "q3"), ("'q3'", "q8_0")),
    ((*GGUF, "--type", "q4_k_m"), ("llama-quantize", "Q4_K_M")),
    ((*GGUF, "--no-cache"), ("--cache", "onnx")),
    (("--format", "onnx", "--context-length", 8), ("--context-length", "gguf")),
    ((), ("--format",)),
]


@pytest.mark.parametrize(("options", "says"), OPTIONS)
def test_options(refuse, tmp_path, llama_folder, options, says):
    refuse(llama_folder, *options, "--out", tmp_path / "x", says=says)


@pytest.mark.parametrize(("format", "module"), [("gguf", "gguf"), ("onnx", "nirvana.export.onnx")])
def test_a_format_whose_packages_are_missing(refuse, tmp_path, llama_folder, monkeypatch, format, module):  # noqa: A002
    for name in [name for name in sys.modules if name.startswith("nirvana.export.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    says = (module, f"pip install 'nirvana[{format}]'")
    refuse(llama_folder, "--format", format, "--out", tmp_path / "x", says=says)


def test_places(refuse, tmp_path, llama_folder):
    (tmp_path / "x.gguf").write_text("mine")
    refuse(llama_folder, *GGUF, "--out", tmp_path / "x.gguf", says=("exists", "--overwrite"))
    refuse(llama_folder, *GGUF, "--out", tmp_path, "--overwrite", says=(str(tmp_path),))
    refuse(tmp_path / "none", *GGUF, "--out", tmp_path / "y.gguf", says=("none",))
    assert (tmp_path / "x.gguf").read_text() == "mine"


def test_no_tokenizer(refuse, tmp_path, llama_folder):
    model = tmp_path / "model"
    shutil.copytree(llama_folder, model, ignore=shutil.ignore_patterns("tokenizer*"))
    refuse(model, *GGUF, "--out", tmp_path / "x.gguf", says=("tokenizer.json",))


@pytest.mark.parametrize(
    ("value", "options", "says"),
    [
        (7e4, (), ("7e+04", "F16", "--type bf16")),
        (-7e4, ("--type", "q4_0"), ("7e+04", "Q4_0", "--type bf16")),
        (float("nan"), ("--type", "f32"), ("NaN or infinity",)),
        (float("-inf"), ("--type", "bf16"), ("NaN or infinity",)),
    ],
)
def test_values_that_the_type_does_not_hold(refuse, tmp_path, llama_folder, value, options, says):
    model = tmp_path / "model"
    shutil.copytree(llama_folder, model)
    tensors = load_file(model / "model.safetensors")
    # In the last layer, so that most of the file is there already.
    tensors["model.layers.1.mlp.up_proj.weight"][5, 7] = value
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    refuse(model, *GGUF, *options, "--out", tmp_path / "x.gguf", says=("blk.1.ffn_up.weight", *says))


def test_a_missing_tensor(refuse, tmp_path, llama_folder):
    model = tmp_path / "model"
    shutil.copytree(llama_folder, model)
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    refuse(model, *GGUF, "--out", tmp_path / "x.gguf", says=("model.layers.1.mlp.down_proj.weight",))


def test_a_full_disk(refuse, tmp_path, llama_folder):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        refuse(llama_folder, *GGUF, "--out", tmp_path / "new" / "x.gguf", says=("x.gguf", "nothing was written"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_two_values_for_one_tied_matrix_are_no_tie(tmp_path, tokenizer):
    """transformers unties them; so does the file."""
    path = checkpoint(tmp_path, tokenizer, "llama-tied")
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    equal = nirvana.export(path, "gguf", tmp_path / "equal.gguf", type="f32")
    tensors["lm_head.weight"] += torch.eye(*tensors["lm_head.weight"].shape)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    other = nirvana.export(path, "gguf", tmp_path / "other.gguf", type="f32")
    assert other.path.stat().st_size - equal.path.stat().st_size >= tensors["lm_head.weight"].numel() * 4
