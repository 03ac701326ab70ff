"""What the command line refuses: one line on stderr, exit code 2 (130 when interrupted), nothing half-written."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, Outcome, cli_command
from safetensors.torch import load_file, save, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import nirvana
from nirvana.architectures import FAMILIES

UP = "model.layers.0.mlp.up_proj.weight"
WEIGHTS = "model.safetensors"
PAGE = resource.getpagesize()


def listing(folder: Path) -> dict[str, tuple[int, int] | None]:
    """Everything below a folder, hidden files included; files with their size and time of change."""
    return {
        str(path.relative_to(folder)): None if path.is_dir() else (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in folder.rglob("*")
    }


def assert_refused(outcome: Outcome, command: object, says: tuple[str, ...] = (), code: int = 2) -> None:
    assert outcome.code == code, outcome
    assert "Traceback" not in outcome.stderr
    assert outcome.stdout == ""
    assert outcome.stderr.endswith("\n")
    (line,) = outcome.stderr.splitlines()
    assert line.startswith(f"nirvana {command}: ")
    assert [fragment for fragment in says if fragment not in line] == [], line


@pytest.fixture
def refuse(tmp_path, cli_here) -> Callable[..., str]:
    """Runs a command that must be refused without leaving a trace in `tmp_path`; returns its message."""

    def check(*arguments: object, says: tuple[str, ...] = (), run: Callable[..., Outcome] = cli_here) -> str:
        before = listing(tmp_path)
        outcome = run(*arguments)
        assert_refused(outcome, arguments[0], says)
        assert listing(tmp_path) == before, "files were made, removed or changed"
        return outcome.stderr

    return check


@pytest.fixture
def model(tmp_path, llama_folder) -> Path:
    """A copy of the tiny Llama that a test may damage."""
    return Path(shutil.copytree(llama_folder, tmp_path / "model"))


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "result"


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ---------------------------------------------------------------- options

RANGE = "above 0 and below 1"
OPTIONS = [
    ("--sparsity", "0", (RANGE,)),
    ("--sparsity", "1", (RANGE,)),
    ("--sparsity", "-1", (RANGE,)),
    ("--sparsity", "nan", (RANGE,)),
    ("--sparsity", "inf", (RANGE,)),
    ("--sparsity", "abc", ("'abc'", "number", "--help")),
    ("--sparsity", "", ("''", "number", "--help")),
    ("--gamma", "0", ("positive",)),
    ("--gamma", "nan", ("positive",)),
    ("--gamma", "-1", ("positive",)),
    ("--gamma", "inf", ("positive",)),
    ("--gamma", "abc", ("'abc'", "number", "--help")),
    ("--align", "0", ("at least 1",)),
    ("--align", "-8", ("at least 1",)),
    ("--align", "8.5", ("'8.5'", "int", "--help")),
    ("--rounding", "down", ("'down'", "budget", "up")),
    ("--scope", "head", ("'head'", "both", "attention", "mlp")),
    ("--allocation", "local", ("'local'", "global", "uniform")),
]
SCORING = [
    ("--micro-batch", "0", ("at least 1",)),
    ("--micro-batch", "-2", ("at least 1",)),
    ("--criterion", "taylor", ("'taylor'", "nirvana", "magnitude", "random")),
    ("--objective", "mse", ("'mse'", "max-logit", "nll")),
    ("--device", "nonsense", ("'nonsense'", "cpu", "cuda")),
    ("--device", "", ("''",)),
    ("--device", "cuda:99", ("'cuda:99'",)),
    ("--device", "meta", ("'meta'",)),
    ("--device", "hpu", ("'hpu'",)),
    ("--dtype", "nonsense", ("'nonsense'", "auto", "float32", "bfloat16", "float16")),
    ("--dtype", "int8", ("'int8'", "auto", "float32", "bfloat16", "float16")),
    ("--seed", "abc", ("'abc'", "int", "--help")),
]


def options(cases: list[tuple[str, str, tuple[str, ...]]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("option", "value", "says"), cases, ids=[f"{option} {value}" for option, value, _ in cases]
    )


@options(OPTIONS + SCORING)
def test_options_of_prune(refuse, llama_folder, tokens_file, out, option, value, says):
    named = f"{option} {value}" if value.lstrip("-").isdigit() or value in ("nan", "inf") else option
    command = ("prune", llama_folder, "--sparsity", 0.3, "--calibration", tokens_file, "--out", out)
    refuse(*command, option, value, says=(named, *says))


@options(SCORING)
def test_options_of_score(refuse, llama_folder, tokens_file, out, option, value, says):
    refuse("score", llama_folder, "--calibration", tokens_file, "--out", out, option, value, says=(option, *says))


@options(OPTIONS)
def test_options_of_plan(refuse, llama_folder, saliency_file, out, option, value, says):
    command = ("plan", llama_folder, "--saliency", saliency_file, "--sparsity", 0.3, "--out", out)
    refuse(*command, option, value, says=(option, *says))


@options(
    [
        ("--dtype", "nonsense", ("--dtype", "'nonsense'", "float32")),
        ("--max-shard-size", "nonsense", ("--max-shard-size", "'nonsense'", "GB")),
        ("--max-shard-size", "0", ("--max-shard-size", "'0'", "GB")),
        ("--max-shard-size", "", ("--max-shard-size", "''", "GB")),
    ]
)
def test_options_of_apply(refuse, llama_folder, plan_file, out, option, value, says):
    refuse("apply", llama_folder, "--plan", plan_file, "--out", out, option, value, says=says)


@options(
    [
        ("--window", "0", ("--window 0", "2 tokens")),
        ("--window", "100000", ("100000", "lower --window")),
        ("--stride", "0", ("--stride 0", "1 <=")),
        ("--stride", "-4", ("--stride -4", "1 <=")),
        ("--stride", "1000", ("--stride 1000", "<= window")),
        ("--max-windows", "0", ("--max-windows 0", "at least 1")),
        ("--text", "no-such-text", ("'no-such-text'", ".txt")),
        ("--device", "nonsense", ("--device 'nonsense'", "cpu", "cuda")),
        ("--dtype", "nonsense", ("--dtype 'nonsense'", "float32")),
        ("--reference", "/no/such/model", ("/no/such/model", "give a checkpoint folder")),
    ]
)
def test_options_of_eval(refuse, tmp_path, llama_folder, option, value, says):
    text = tmp_path / "text.txt"
    text.write_text("the sea the sea " * 100)
    refuse("eval", llama_folder, "--text", text, "--window", 32, option, value, says=says)


@pytest.mark.parametrize("seed", [2**64, -(2**64)])
def test_a_seed_beyond_64_bits(refuse, llama_folder, out, seed):
    choice = ("--sparsity", 0.3, "--criterion", "random")
    refuse("prune", llama_folder, *choice, f"--seed={seed}", "--out", out, says=("--seed", str(seed)))


@pytest.mark.parametrize(
    ("option", "says"), [(("--num-examples", 0), ("0 examples", "at least 1")), (("--seq-len", 1), ("of 1 token", "2"))]
)
def test_an_empty_batch(refuse, llama_folder, out, option, says):
    refuse("score", llama_folder, *option, "--out", out, says=says)


def test_scope_with_too_few_parameters(refuse, llama_folder, saliency_file, out):
    command = ("plan", llama_folder, "--saliency", saliency_file, "--out", out)
    refuse(*command, "--sparsity", 0.9, "--scope", "attention", says=("--sparsity 0.9", "attention", "--scope both"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), ("COMMAND", "--help")),
        (("polish",), ("'polish'", "prune", "--help")),
        (("prune",), ("MODEL", "--sparsity", "--out", "--help")),
        (("prune", "demo", "--out", "x"), ("--sparsity", "--help")),
        (("prune", "demo", "--sparsity", "0.3"), ("--out", "--help")),
        (("apply", "demo", "--out", "x"), ("--plan", "--help")),
        (("info", "x", "--colour"), ("--colour", "--help")),
        (("info", "x", "two\nlines"), ("--help",)),
    ],
)
def test_incomplete_command_lines(cli_here, arguments, says):
    outcome = cli_here(*arguments)
    assert outcome.code == 2
    assert outcome.stdout == ""
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("nirvana")
    assert [fragment for fragment in says if fragment not in line] == []


# ---------------------------------------------------------------- models


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("/no/such/folder", ("/no/such/folder", "give a checkpoint folder")),
        ("./typo", ("typo", "give a checkpoint folder")),
        ("a/b/c", ("a/b/c", "give a checkpoint folder")),
        ("missing.gguf", ("missing.gguf",)),
        ("not a name!", ("'not a name!'", "Hub id")),
        ("/" + "x" * 5000, ("xxx",)),
        ("./two\nlines", ("lines",)),
    ],
)
@pytest.mark.parametrize("command", ["prune", "apply"])
def test_an_unknown_model(refuse, tokens_file, plan_file, out, command, name, says):
    options = {"prune": ("--sparsity", 0.3, "--calibration", tokens_file), "apply": ("--plan", plan_file)}
    refuse(command, name, *options[command], "--out", out, says=says)


def test_an_unknown_hub_id_without_network(refuse, cli, tmp_path, out):
    """Nothing listens on port 9: every connection is refused at once, as on a machine without network."""
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    command = ("prune", "nobody/nothing", "--sparsity", 0.3, "--out", out)
    started = time.monotonic()
    refuse(
        *command,
        run=lambda *arguments: cli(*arguments, **nowhere),
        says=("'nobody/nothing'", "give a checkpoint folder"),
    )
    assert time.monotonic() - started < 20, "it waits for a network that is not there"


@pytest.mark.parametrize("name", ["text.txt", "bad.gguf", "folder"])
def test_a_path_that_is_no_model(refuse, tmp_path, tokens_file, out, name):
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    else:
        path.write_text("hello, I am no model " * 10)
    remedy = {"text.txt": "checkpoint folder", "bad.gguf": "GGUF", "folder": "config.json"}
    command = ("prune", path, "--sparsity", 0.3, "--calibration", tokens_file, "--out", out)
    refuse(*command, says=(str(path), remedy[name]))


GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_layer": 2, "n_head": 2, "n_embd": 32}


@pytest.mark.parametrize("command", ["prune", "score", "plan", "apply", "eval"])
def test_an_unknown_family(refuse, model, tokens_file, saliency_file, plan_file, out, command):
    (model / "config.json").write_text(json.dumps(GPT2))
    options = {
        "prune": ("--sparsity", 0.3, "--calibration", tokens_file, "--out", out),
        "score": ("--calibration", tokens_file, "--out", out),
        "plan": ("--saliency", saliency_file, "--sparsity", 0.3, "--out", out),
        "apply": ("--plan", plan_file, "--out", out),
        "eval": (),
    }
    refuse(command, model, *options[command], says=("'gpt2'", *sorted(FAMILIES)))


def test_a_family_that_transformers_does_not_know(refuse, model, tokens_file, out):
    edit_json(model / "config.json", model_type="gyroscope")
    command = ("prune", model, "--sparsity", 0.3, "--calibration", tokens_file, "--out", out)
    refuse(*command, says=("gyroscope", *sorted(FAMILIES)))


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[]", "{}", '{"model_type": 3}', '{"model_type": "llama", "hidden_size": "big"}'],
)
def test_a_config_that_is_none(refuse, model, tokens_file, out, text):
    (model / "config.json").write_text(text)
    refuse("prune", model, "--sparsity", 0.3, "--calibration", tokens_file, "--out", out, says=(str(model),))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 0),
        ("num_hidden_layers", -1),
        ("num_key_value_heads", 0),
        ("num_key_value_heads", 3),
        ("intermediate_size", 48.5),
        ("hidden_act", "nope"),
        ("dtype", "nope"),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
    ],
)
def test_a_config_that_makes_no_sense(refuse, model, tokens_file, out, key, value):
    edit_json(model / "config.json", **{key: value})
    refuse("prune", model, "--sparsity", 0.3, "--calibration", tokens_file, "--out", out)


@pytest.mark.parametrize("command", ["prune", "apply"])
@pytest.mark.parametrize(
    ("key", "value", "tensor"),
    [
        ("intermediate_size", 56, "model.layers.0.mlp."),
        ("num_key_value_heads", 2, "model.layers.0.self_attn."),
        ("num_hidden_layers", 3, "model.layers.2."),
        ("vocab_size", VOCABULARY + 8, "embed_tokens"),
    ],
)
def test_weights_that_differ_from_the_config(refuse, model, tokens_file, out, tmp_path, command, key, value, tensor):
    """The message names a tensor. Left to itself, transformers draws at random what a checkpoint lacks."""
    edit_json(model / "config.json", **{key: value})
    options = ("--sparsity", 0.3, "--calibration", tokens_file)
    if command == "apply":
        architecture = nirvana.describe(LlamaConfig.from_pretrained(model))
        scores = {block.name: torch.arange(block.size) for block in architecture.blocks}
        nirvana.allocate(scores, architecture, sparsity=0.3).save(tmp_path / "plan.json")
        options = ("--plan", tmp_path / "plan.json")
    refuse(command, model, *options, "--out", out, says=(tensor,))


def test_code_in_a_checkpoint_is_not_run(refuse, model, tmp_path, tokens_file, out):
    marker = tmp_path / "it-ran"
    code = f"open({str(marker)!r}, 'w')\nfrom transformers import LlamaConfig\nclass Mine(LlamaConfig): pass\n"
    (model / "mine.py").write_text(code)
    edit_json(model / "config.json", model_type="mine", auto_map={"AutoConfig": "mine.Mine"})
    command = ("prune", model, "--sparsity", 0.3, "--calibration", tokens_file, "--out", out)
    refuse(*command, says=(str(model), "custom code"))
    assert not marker.exists()


def test_pickled_weights_are_not_opened(refuse, model, tmp_path, tokens_file, plan_file, out):
    marker = tmp_path / "it-ran"
    (model / WEIGHTS).unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(marker)))
    command = ("prune", model, "--sparsity", 0.3, "--calibration", tokens_file, "--out", out)
    refuse(*command, says=(str(model), "safetensors"))
    refuse("apply", model, "--plan", plan_file, "--out", out, says=(str(model), "safetensors"))
    assert not marker.exists()


# ---------------------------------------------------------------- weights


def cut_commands(model, tokens_file, plan_file, out) -> Iterator[tuple[object, ...]]:
    yield "prune", model, "--sparsity", 0.3, "--calibration", tokens_file, "--out", out
    yield "apply", model, "--plan", plan_file, "--out", out


@pytest.mark.parametrize("length", [-1, 0.5, 100, 4, 0])
def test_truncated_weights(refuse, model, tokens_file, plan_file, out, length):
    content = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(content[: int(len(content) * length) if length == 0.5 else length])
    for command in cut_commands(model, tokens_file, plan_file, out):
        refuse(*command, says=(str(model / WEIGHTS),))


@pytest.mark.parametrize(
    "content",
    [b"{", b"[]", b"{}", b'{"weight_map": []}', b'{"metadata": {}, "weight_map": {"x": "model-1.safetensors"}}'],
)
def test_a_damaged_weight_index(refuse, model, tokens_file, plan_file, out, content):
    (model / WEIGHTS).unlink()
    (model / f"{WEIGHTS}.index.json").write_bytes(content)
    for command in cut_commands(model, tokens_file, plan_file, out):
        refuse(*command, says=(str(model),))


def test_a_missing_shard(refuse, model, tokens_file, plan_file, out):
    LlamaForCausalLM.from_pretrained(model).save_pretrained(model, max_shard_size="60KB")
    (model / WEIGHTS).unlink()
    shards = sorted(model.glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[1].unlink()
    for command in cut_commands(model, tokens_file, plan_file, out):
        refuse(*command, says=(shards[1].name,))


@pytest.mark.parametrize("name", [UP, "model.layers.1.self_attn.k_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_a_missing_tensor(refuse, model, tokens_file, plan_file, out, name):
    """Left to itself, transformers draws the missing weights at random and says so only in a warning."""
    edit_weights(model, lambda tensors: tensors.pop(name))
    for command in cut_commands(model, tokens_file, plan_file, out):
        refuse(*command, says=(name,))


@pytest.mark.parametrize("name", [UP, "model.norm.weight"])
def test_a_tensor_of_another_shape(refuse, model, tokens_file, plan_file, out, name):
    edit_weights(model, lambda tensors: tensors.update({name: tensors[name][:-8].clone()}))
    for command in cut_commands(model, tokens_file, plan_file, out):
        refuse(*command, says=(name,))


NAN = [
    UP,
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.0.input_layernorm.weight",
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
]


@pytest.mark.parametrize("command", ["prune", "score"])
@pytest.mark.parametrize("name", NAN)
def test_nan_in_a_weight(refuse, model, tokens_file, out, command, name):
    token = int(np.load(tokens_file)[0, 0])
    row = token if tensors_with_rows_of_tokens(name) else -1
    edit_weights(model, lambda tensors: tensors[name].data[row].fill_(float("nan")))
    options = ("--sparsity", 0.3) if command == "prune" else ()
    line = refuse(command, model, *options, "--calibration", tokens_file, "--out", out, says=(name, "NaN"))
    assert "repair" in line


def tensors_with_rows_of_tokens(name: str) -> bool:
    return name in ("model.embed_tokens.weight", "lm_head.weight")


def test_nan_is_found_by_magnitude_as_well(refuse, model, out):
    edit_weights(model, lambda tensors: tensors[UP][3].fill_(float("nan")))
    refuse("prune", model, "--sparsity", 0.3, "--criterion", "magnitude", "--out", out, says=(UP, "NaN"))


def test_eval_of_a_model_with_nan(refuse, tmp_path, model):
    """A perplexity of nan helps nobody, and NaN is not JSON."""
    (tmp_path / "text.txt").write_text("the sea the sea " * 100)
    edit_weights(model, lambda tensors: tensors[UP][3].fill_(float("nan")))
    refuse("eval", model, "--text", tmp_path / "text.txt", "--window", 32, "--json", says=(UP, "NaN"))


def test_activations_that_overflow_float16(refuse, model, tokens_file, out):
    def grow(tensors):
        for name in tensors:
            if name.endswith(("up_proj.weight", "down_proj.weight")):
                tensors[name] *= 3000

    edit_weights(model, grow)
    command = ("prune", model, "--sparsity", 0.3, "--calibration", tokens_file, "--out", out)
    refuse(*command, "--dtype", "float16", says=("float16", "--dtype float32"))


def test_weights_that_overflow_float16(refuse, model, tokens_file, out):
    """The checkpoint is whole: it is the type that is too small."""
    edit_weights(model, lambda tensors: tensors[UP][0].fill_(1e6))
    command = ("prune", model, "--sparsity", 0.3, "--calibration", tokens_file, "--out", out)
    line = refuse(*command, "--dtype", "float16", says=(UP, "float16", "--dtype float32"))
    assert "repair" not in line


# ---------------------------------------------------------------- tokenizer and text


def test_text_without_a_tokenizer(refuse, model, tmp_path, out):
    for file in model.glob("tokenizer*"):
        file.unlink()
    (tmp_path / "text.txt").write_text("the sea the sea " * 100)
    for command in ("prune", "score"):
        options = ("--sparsity", 0.3) if command == "prune" else ()
        batch = ("--calibration", tmp_path / "text.txt", "--num-examples", 2, "--seq-len", 16)
        refuse(command, model, *options, *batch, "--out", out, says=("no tokenizer", ".npy"))
    refuse("eval", model, "--text", tmp_path / "text.txt", "--window", 16, says=("no tokenizer", str(model)))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", ""),
        ("tokenizer.json", '{"version": "1.0"}'),
        ("tokenizer.json", '{"version": "1.0", "added_tokens": [], "model": {"type": "nope"}}'),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
    ],
)
def test_a_damaged_tokenizer(refuse, model, tmp_path, out, file, content):
    (model / file).write_text(content)
    (tmp_path / "text.txt").write_text("the sea the sea " * 100)
    command = ("prune", model, "--sparsity", 0.3, "--calibration", tmp_path / "text.txt", "--out", out)
    refuse(*command, "--num-examples", 2, "--seq-len", 16, says=("tokenizer", str(model)))


def test_a_tokenizer_of_another_model(refuse, model, tmp_path, out):
    edit_json(model / "config.json", vocab_size=100)
    rows = ("model.embed_tokens.weight", "lm_head.weight")
    edit_weights(model, lambda tensors: tensors.update({name: tensors[name][:100].clone() for name in rows}))
    (tmp_path / "text.txt").write_text("the sea the sea " * 100)
    batch = ("--calibration", tmp_path / "text.txt", "--num-examples", 2, "--seq-len", 16)
    refuse("prune", model, "--sparsity", 0.3, *batch, "--out", out, says=("vocabulary of 100", "tokenizer"))
    refuse("eval", model, "--text", tmp_path / "text.txt", "--window", 16, says=("vocabulary of 100", "tokenizer"))


def test_a_reference_of_another_kind(refuse, llama_folder, t5_folder, tmp_path):
    (tmp_path / "text.txt").write_text("the sea the sea " * 100)
    command = ("eval", llama_folder, "--text", tmp_path / "text.txt", "--window", 16)
    refuse(*command, "--reference", t5_folder, says=("reference",))


def test_a_damaged_generation_config(refuse, model, tokens_file, out):
    (model / "generation_config.json").write_text('{"max_new_tokens": -1}')
    command = ("prune", model, "--sparsity", 0.3, "--calibration", tokens_file, "--out", out)
    refuse(*command, says=("max_new_tokens",))


SHORT = ("2 examples of 16", "lower --num-examples or --seq-len")
TEXTS = [
    ("empty.txt", b"", ("no text",)),
    ("blank.txt", b" \n\t\r\n ", ("no text",)),
    ("short.txt", b"the sea", SHORT),
    ("latin1.txt", "caf\u00e9 ".encode("latin-1") * 100, ("UTF-8",)),
    ("utf16.txt", ("the sea " * 100).encode("utf-16"), ("UTF-8",)),
    ("text.csv", b"the sea " * 100, ("'.csv'", ".txt", ".jsonl", ".parquet", ".npy")),
    ("empty.jsonl", b"\n\n", ("no text",)),
    ("short.jsonl", b'{"text": "the sea"}\n' * 5, SHORT),
    ("broken.jsonl", b'{"text": "the sea"}\n{"text": "the\n', ("line 2", "JSON")),
    ("field.jsonl", b'{"body": "the sea"}\n', ("line 1", '"text"', "body")),
    ("null.jsonl", b'{"text": null}\n', ("line 1", '"text"')),
    ("list.jsonl", b"[1, 2]\n", ("line 1", '"text"', "list")),
    ("latin1.jsonl", '{"text": "caf\u00e9"}'.encode("latin-1"), ("UTF-8",)),
    ("digits.jsonl", b'{"text": "the sea", "n": ' + b"1" * 5000 + b"}\n", ("line 1",)),
    ("deep.jsonl", b"[" * 100_000 + b"\n", ("line 1",)),
    ("surrogate.jsonl", b'{"text": "the \\ud83d sea"}\n' * 50, ("line 1",)),
    ("broken.parquet", b"PAR1 this is no parquet PAR1", ("Parquet",)),
]


@pytest.mark.parametrize(("name", "content", "says"), TEXTS, ids=[name for name, _, _ in TEXTS])
def test_text_that_is_refused(refuse, llama_folder, tmp_path, out, name, content, says):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    path.write_bytes(content)
    command = ("prune", llama_folder, "--sparsity", 0.3, "--calibration", path, "--out", out)
    refuse(*command, "--num-examples", 2, "--seq-len", 16, says=(str(path), *says))


def test_parquet_without_a_text_column(refuse, llama_folder, tmp_path, out):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for number, column in enumerate(({"body": ["the sea"]}, {"text": [1]})):
        path = tmp_path / f"{number}.parquet"
        parquet.write_table(pyarrow.table(column), path)
        refuse("score", llama_folder, "--calibration", path, "--out", out, says=(str(path), "text"))


@pytest.mark.parametrize("name", ["c4", "missing.txt", "missing.npy", "/no/such/folder", "x" * 5000])
def test_an_unknown_corpus(refuse, llama_folder, out, name):
    says = (name,) if name.endswith("npy") else (name[:50], "novels", ".txt")
    refuse("prune", llama_folder, "--sparsity", 0.3, "--calibration", name, "--out", out, says=says)


# ---------------------------------------------------------------- token files

REMEDY = "integers [examples, tokens]"
ARRAYS = {
    "floats": (np.zeros((2, 8), np.float32), ("float32", REMEDY)),
    "booleans": (np.zeros((2, 8), bool), ("bool", REMEDY)),
    "records": (np.zeros((2, 8), [("a", "i8")]), (REMEDY,)),
    "strings": (np.array([["the", "sea"]]), (REMEDY,)),
    "rank 0": (np.int64(3), ("[]", REMEDY)),
    "rank 1": (np.zeros(8, np.int64), ("[8]", REMEDY)),
    "rank 3": (np.zeros((2, 2, 8), np.int64), ("[2, 2, 8]", REMEDY)),
    "no examples": (np.zeros((0, 8), np.int64), ("[0, 8]", "at least 1")),
    "one token": (np.zeros((2, 1), np.int64), ("[2, 1]", "at least")),
    "beyond": (np.full((2, 8), VOCABULARY), (f"token id {VOCABULARY} ", f"vocabulary of {VOCABULARY}", "tokenizer")),
    "negative": (np.full((2, 8), -1), ("token id -1 ", f"vocabulary of {VOCABULARY}", "tokenizer")),
    "uint64": (np.full((2, 8), 2**64 - 1, np.uint64), (f"vocabulary of {VOCABULARY}",)),
}


@pytest.mark.parametrize(("array", "says"), ARRAYS.values(), ids=ARRAYS)
@pytest.mark.parametrize("command", ["prune", "score"])
def test_arrays_that_are_refused(refuse, llama_folder, tmp_path, out, command, array, says):
    np.save(tmp_path / "tokens.npy", array)
    options = ("--sparsity", 0.3) if command == "prune" else ()
    refuse(command, llama_folder, *options, "--calibration", tmp_path / "tokens.npy", "--out", out, says=says)


def npy(shape: str) -> bytes:
    """A .npy file whose header promises an array of int64 of this shape; 64 bytes of it follow."""
    header = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(64)


FILES = {
    "empty": b"",
    "text": b"1 2 3 4\n",
    "header cut": npy("(2, 4)")[:40],
    "data cut": npy("(2, 40)"),
    "more than memory": npy("(1000000000000, 1000000)"),
    "negative shape": npy("(-1, -1)"),
}


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_token_files_that_are_damaged(refuse, llama_folder, tmp_path, out, content):
    path = tmp_path / "tokens.npy"
    path.write_bytes(content)
    command = ("prune", llama_folder, "--sparsity", 0.3, "--calibration", path, "--out", out)
    refuse(*command, says=(str(path), ".npy"))


def test_a_folder_named_npy(refuse, llama_folder, tmp_path, out):
    (tmp_path / "tokens.npy").mkdir()
    refuse("score", llama_folder, "--calibration", tmp_path / "tokens.npy", "--out", out, says=("tokens.npy",))


def test_an_archive_renamed_to_npy(refuse, llama_folder, tmp_path, out):
    np.savez(tmp_path / "tokens.npz", tokens=np.ones((2, 8), np.int64))
    refuse("score", llama_folder, "--calibration", tmp_path / "tokens.npz", "--out", out, says=("'.npz'", ".npy"))
    (tmp_path / "tokens.npz").rename(tmp_path / "tokens.npy")
    refuse("score", llama_folder, "--calibration", tmp_path / "tokens.npy", "--out", out, says=("archive", REMEDY))


class Bomb:
    """An object that makes a file when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("kind", ["array of objects", "bare pickle", "archive of objects"])
def test_pickles_are_refused_and_never_unpickled(refuse, llama_folder, tmp_path, out, kind):
    path, marker = tmp_path / "tokens.npy", tmp_path / "it-ran"
    if kind == "array of objects":
        np.save(path, np.array([[Bomb(marker)]], dtype=object), allow_pickle=True)
    elif kind == "bare pickle":
        path.write_bytes(pickle.dumps(Bomb(marker)))
    else:
        with open(path, "wb") as file:
            np.savez(file, tokens=np.array([[Bomb(marker)]], dtype=object))
    command = ("prune", llama_folder, "--sparsity", 0.3, "--calibration", path, "--out", out)
    line = refuse(*command, says=(str(path),))
    assert not marker.exists(), "the pickle was run"
    # numpy's own advice, to load it all the same, would be the wrong remedy.
    assert "allow_pickle=`" not in line
    # The bomb is live: whoever unpickles it sets it off.
    content = np.load(path, allow_pickle=True)
    if kind == "archive of objects":
        content["tokens"]
    assert marker.exists()


# ---------------------------------------------------------------- plans and saliency


def with_kept(kept: Callable[[list[int]], list]) -> Callable[[dict], object]:
    return lambda plan: plan["blocks"][1].update(kept=kept(plan["blocks"][1]["kept"]))


MLP = "block model.layers.0.mlp"
PLANS = {
    "doubled": (with_kept(lambda kept: [kept[0], *kept]), (MLP, "double")),
    "unsorted": (with_kept(lambda kept: kept[::-1]), (MLP, "sorted")),
    "empty": (with_kept(lambda kept: []), (MLP, "empty")),
    "out of range": (with_kept(lambda kept: [*kept, 48]), (MLP, "48", "out of range")),
    "negative": (with_kept(lambda kept: [-1, *kept]), (MLP,)),
    "fraction": (with_kept(lambda kept: [*kept, 47.5]), (MLP,)),
    "unit": (lambda plan: plan["blocks"][1].update(unit="layer"), (MLP, "'layer'", "'neuron'")),
    "size": (lambda plan: plan["blocks"][1].update(size="48"), (MLP, "size")),
    "block twice": (lambda plan: plan["blocks"].append(plan["blocks"][1]), ("model.layers.0.mlp", "more than once")),
    "nameless": (lambda plan: plan["blocks"][1].pop("name"), ("name",)),
    "no blocks": (lambda plan: plan["blocks"].clear(), ("block",)),
    "no list": (lambda plan: plan.update(blocks={}), ('"blocks"',)),
    "no totals": (lambda plan: plan.pop("totals"), ('"totals"',)),
    "totals of zero": (lambda plan: plan["totals"].update(prunable_before=0, parameters_before=0), ("totals",)),
    "negative totals": (lambda plan: plan["totals"].update(prunable_after=-1), ("totals", "prunable_after")),
    "other format": (lambda plan: plan.update(format="recipe"), ('"format"', "nirvana-plan")),
    "other version": (lambda plan: plan.update(version=2), ("version 2",)),
}
#: What only shows beside the model: `info` may still draw these.
STRANGE_PLANS = {
    "unknown block": (lambda plan: plan["blocks"][1].update(name="model.layers.9.mlp"), ("model.layers.9.mlp",)),
    "missing block": (lambda plan: plan["blocks"].pop(1), ("model.layers.0.mlp",)),
    "another width": (lambda plan: plan["blocks"][1].update(size=64), (MLP, "64", "48", "make a plan for this model")),
    "another family": (lambda plan: plan.update(architecture="qwen2"), ("'qwen2'", "'llama'")),
}


@pytest.mark.parametrize(("change", "says"), PLANS.values(), ids=PLANS)
def test_plans_that_are_refused(refuse, tmp_path, llama_folder, plan_file, out, change, says):
    plan = json.loads(plan_file.read_text())
    change(plan)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(plan))
    refuse("apply", llama_folder, "--plan", path, "--out", out, says=(str(path), *says))
    refuse("info", path, says=(str(path), *says))
    refuse("info", path, "--json", says=(str(path), *says))


@pytest.mark.parametrize(("change", "says"), STRANGE_PLANS.values(), ids=STRANGE_PLANS)
def test_plans_for_another_model(refuse, tmp_path, llama_folder, plan_file, out, change, says):
    plan = json.loads(plan_file.read_text())
    change(plan)
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    refuse("apply", llama_folder, "--plan", tmp_path / "plan.json", "--out", out, says=says)


def test_a_real_plan_for_another_model(refuse, t5_folder, plan_file, out):
    refuse("apply", t5_folder, "--plan", plan_file, "--out", out, says=("'llama'", "'t5'"))


NO_PLANS = {
    "empty": b"",
    "text": b"keep everything",
    "list": b"[]",
    "null": b"null",
    "bytes": bytes(range(256)),
    "cut": b'{"format": "nirvana-plan", "ver',
    "digits": b'{"format": "nirvana-plan", "version": ' + b"1" * 5000 + b"}",
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("content", NO_PLANS.values(), ids=NO_PLANS)
def test_files_that_are_no_plan(refuse, tmp_path, llama_folder, out, content):
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    refuse("apply", llama_folder, "--plan", path, "--out", out, says=(str(path), "plan"))
    refuse("info", path, says=(str(path), "plan"))


@pytest.mark.parametrize("name", ["missing.json", "folder", "text.txt/plan.json", "x" * 5000])
def test_no_plan_there(refuse, tmp_path, llama_folder, out, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.txt").touch()
    refuse("apply", llama_folder, "--plan", tmp_path / name, "--out", out, says=(name[:50],))
    refuse("info", tmp_path / name, says=(name[:50],))


SALIENCY = "nirvana-saliency"
METADATA = [None, {"format": "pt"}, {SALIENCY: "pt"}, {SALIENCY: "[]"}, {SALIENCY: '{"version": 1}'}]
METADATA += [{SALIENCY: '{"version": 1, "settings": [1]}'}, {SALIENCY: '{"version": 2, "settings": {}}'}]


@pytest.mark.parametrize("metadata", METADATA)
def test_files_that_are_no_saliency(refuse, tmp_path, llama_folder, saliency_file, out, metadata):
    path = tmp_path / "saliency.safetensors"
    path.write_bytes(save(load_file(saliency_file), metadata))
    refuse("plan", llama_folder, "--saliency", path, "--sparsity", 0.3, "--out", out, says=(str(path), "saliency"))


BLOCK = "model.layers.1.mlp"
SCORES = {
    "missing": (lambda scores: scores.pop(BLOCK), (BLOCK, "score this model")),
    "too few": (lambda scores: scores.update({BLOCK: torch.ones(47)}), (BLOCK, "48", "[47]", "score this model")),
    "too deep": (lambda scores: scores.update({BLOCK: torch.ones(48, 1)}), (BLOCK, "[48, 1]")),
    "nan": (lambda scores: scores[BLOCK][0].fill_(float("nan")), (BLOCK, "finite", "--dtype float32")),
    "infinite": (lambda scores: scores[BLOCK][0].fill_(float("inf")), (BLOCK, "finite", "--dtype float32")),
}


@pytest.mark.parametrize(("change", "says"), SCORES.values(), ids=SCORES)
def test_saliency_that_is_refused(refuse, tmp_path, llama_folder, saliency_file, out, change, says):
    saliency = nirvana.Saliency.load(saliency_file)
    scores = dict(saliency)
    change(scores)
    nirvana.Saliency(scores, saliency.settings).save(tmp_path / "saliency")
    command = ("plan", llama_folder, "--saliency", tmp_path / "saliency", "--sparsity", 0.3, "--out", out)
    refuse(*command, says=says)


@pytest.mark.parametrize("name", ["missing", "folder", "text", "cut"])
def test_no_saliency_there(refuse, tmp_path, llama_folder, saliency_file, out, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("every unit matters")
    (tmp_path / "cut").write_bytes(saliency_file.read_bytes()[:-8])
    command = ("plan", llama_folder, "--saliency", tmp_path / name, "--sparsity", 0.3, "--out", out)
    refuse(*command, says=(str(tmp_path / name), "saliency"))


def test_saliency_of_another_model(refuse, t5_folder, saliency_file, out):
    command = ("plan", t5_folder, "--saliency", saliency_file, "--sparsity", 0.3, "--out", out)
    refuse(*command, says=("encoder.block.0.layer.0.SelfAttention", "score this model"))


# ---------------------------------------------------------------- where the result goes


@pytest.fixture
def writers(llama_folder, tokens_file, saliency_file, plan_file) -> dict[str, tuple[object, ...]]:
    """Every command that writes, without its --out."""
    return {
        "prune": ("prune", llama_folder, "--sparsity", 0.3, "--calibration", tokens_file),
        "score": ("score", llama_folder, "--calibration", tokens_file),
        "plan": ("plan", llama_folder, "--saliency", saliency_file, "--sparsity", 0.3),
        "apply": ("apply", llama_folder, "--plan", plan_file),
    }


WRITERS = ["prune", "score", "plan", "apply"]


@pytest.mark.parametrize("command", WRITERS)
@pytest.mark.parametrize("kind", ["file", "empty folder", "checkpoint", "dangling link"])
def test_what_exists_is_not_overwritten(refuse, writers, llama_folder, tmp_path, out, command, kind):
    if kind == "file":
        out.write_text("precious")
    elif kind == "empty folder":
        out.mkdir()
    elif kind == "checkpoint":
        shutil.copytree(llama_folder, out)
    else:
        out.symlink_to(tmp_path / "nowhere")
    refuse(*writers[command], "--out", out, says=(str(out), "exists", "--overwrite"))


@pytest.mark.parametrize("command", ["prune", "apply"])
@pytest.mark.parametrize("kind", ["file", "folder", "folder with a config.json", "link to a checkpoint"])
def test_overwrite_spares_what_is_no_checkpoint(refuse, writers, llama_folder, tmp_path, out, command, kind):
    if kind == "file":
        out.write_text("precious")
    elif kind == "link to a checkpoint":
        shutil.copytree(llama_folder, tmp_path / "elsewhere")
        out.symlink_to(tmp_path / "elsewhere")
    else:
        (out / "photos").mkdir(parents=True)
        (out / "photos" / "precious.jpg").write_text("precious")
        if kind == "folder with a config.json":
            # Many programs keep a config.json; it does not make a checkpoint of a folder.
            (out / "config.json").write_text('{"theme": "dark"}')
    refuse(*writers[command], "--out", out, "--overwrite", says=(str(out), "checkpoint"))


def test_overwrite_spares_a_folder_that_holds_the_model(refuse, llama_folder, plan_file, tmp_path):
    outer = Path(shutil.copytree(llama_folder, tmp_path / "outer"))
    inner = Path(shutil.copytree(llama_folder, outer / "inner"))
    refuse("apply", inner, "--plan", plan_file, "--out", outer, "--overwrite", says=(str(outer),))


@pytest.mark.parametrize("command", ["score", "plan"])
def test_a_file_does_not_replace_a_folder(refuse, writers, out, command):
    out.mkdir()
    refuse(*writers[command], "--out", out, "--overwrite", says=(str(out), "folder", "choose another name"))


@pytest.mark.parametrize("command", WRITERS)
def test_a_file_for_a_parent(refuse, writers, tmp_path, command):
    (tmp_path / "file").write_text("precious")
    refuse(*writers[command], "--out", tmp_path / "file" / "result", says=(str(tmp_path / "file"), "folder"))


@pytest.mark.parametrize("command", WRITERS)
@pytest.mark.parametrize("length", [250, 300, 5000])
def test_names_that_are_too_long(refuse, writers, tmp_path, command, length):
    """255 bytes is the limit of most file systems, and the temporary name is longer than the name asked for."""
    refuse(*writers[command], "--out", tmp_path / ("x" * length), says=("too long",))


@pytest.mark.parametrize("command", WRITERS)
def test_a_name_of_two_lines(refuse, writers, tmp_path, command):
    (tmp_path / "two\nlines").write_text("precious")
    refuse(*writers[command], "--out", tmp_path / "two\nlines", says=("exists",))


@pytest.mark.parametrize("option", [("--text", "no-such-text"), ("--window", 0), ("--max-windows", 0)])
def test_prune_checks_the_evaluation_before_it_works(refuse, writers, out, option):
    refuse(*writers["prune"], "--evaluate", *option, "--out", out, says=(str(option[1]),))


@contextlib.contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A small disk in memory. Skips where mounting is not allowed."""
    folder.mkdir()
    mount = shutil.which("mount")
    command = [mount, "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs needs the rights of an administrator")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("command", WRITERS)
def test_a_read_only_disk(refuse, writers, tmp_path, command):
    with mounted(tmp_path / "disk", "size=1m,ro") as disk:
        refuse(*writers[command], "--out", disk / "result", says=(str(disk), "not a writable folder"))
        refuse(*writers[command], "--out", disk / "new" / "result", says=(str(disk), "not a writable folder"))


@pytest.mark.parametrize("command", WRITERS)
@pytest.mark.skipif(os.geteuid() == 0, reason="permission bits do not bind root")
def test_a_read_only_folder(refuse, writers, tmp_path, command):
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o555)
    refuse(*writers[command], "--out", folder / "result", says=(str(folder), "not a writable folder"))


@pytest.mark.parametrize("short", [1, 2, 3, 4, 6, 8, 12, 30])
@pytest.mark.parametrize("command", ["prune", "apply"])
def test_a_full_disk(refuse, writers, cli_here, tmp_path, out, command, short):
    """The disk lacks a few pages: enough steps that it fills up in the weights, the tokenizer and the small files."""
    assert cli_here(*writers[command], "--out", out).code == 0
    needed = sum(-(-file.stat().st_size // PAGE) for file in out.iterdir())
    with mounted(tmp_path / "disk", f"size={(needed - short) * PAGE}") as disk:
        refuse(*writers[command], "--out", disk / "result", says=(str(disk / "result"), "No space left"))


def test_a_full_disk_keeps_the_old_checkpoint(refuse, writers, llama_folder, tmp_path):
    with mounted(tmp_path / "disk", "size=300k") as disk:
        shutil.copytree(llama_folder, disk / "result")
        refuse(*writers["apply"], "--out", disk / "result", "--overwrite", says=("No space left",))


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """The kernel refuses to let a file of this process grow beyond `size` bytes, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("command", "size"), [("prune", 1000), ("prune", 100_000), ("apply", 100_000), ("score", 500), ("plan", 500)]
)
def test_a_file_that_may_not_grow(refuse, writers, out, command, size):
    with file_size_limit(size):
        refuse(*writers[command], "--out", out, says=(str(out), "File too large"))


@pytest.mark.parametrize("command", WRITERS)
def test_new_parents_go_again(refuse, writers, out, command):
    with file_size_limit(500):
        refuse(*writers[command], "--out", out / "new" / "result", says=("File too large",))


# ---------------------------------------------------------------- processes of their own


@pytest.mark.parametrize("case", ["mismatch", "plan", "full disk"])
def test_refusals_in_a_process_of_its_own(refuse, cli, model, tokens_file, plan_file, tmp_path, out, case):
    """As users see it: nothing that the libraries log or warn joins the one line."""
    prune = ("prune", model, "--calibration", tokens_file, "--sparsity", 0.3, "--out", out)
    if case == "mismatch":
        edit_weights(model, lambda tensors: tensors.update({UP: tensors[UP][:-8].clone()}))
        refuse(*prune, run=cli, says=(UP,))
    elif case == "plan":
        plan = json.loads(plan_file.read_text())
        plan["blocks"][1]["kept"].append(48)
        (tmp_path / "plan.json").write_text(json.dumps(plan))
        refuse("apply", model, "--plan", tmp_path / "plan.json", "--out", out, run=cli, says=(MLP, "48"))
    else:

        def limited(*arguments: object) -> Outcome:
            size = (50_000, 50_000)
            return cli(*arguments, before_start=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, size))

        refuse(*prune, run=limited, says=(str(out), "File too large", "nothing was written"))


@pytest.mark.parametrize("reader", ["gone", "gone, no buffers", "full disk"])
def test_a_stdout_that_takes_nothing(plan_file, reader):
    """Buffered output, as without a terminal, meets the error only when it is flushed at the end."""
    gone = reader.startswith("gone")
    if gone:
        read_end, write_end = os.pipe()
        os.close(read_end)
    else:
        write_end = os.open("/dev/full", os.O_WRONLY)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    if reader.endswith("no buffers"):
        environment["PYTHONUNBUFFERED"] = "1"
    try:
        process = subprocess.run(
            cli_command("info", plan_file),
            stdout=write_end,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            timeout=60,
        )
    finally:
        os.close(write_end)
    assert process.returncode == 1
    assert "Traceback" not in process.stderr
    assert "Exception ignored" not in process.stderr
    assert len(process.stderr.splitlines()) == (0 if gone else 1)


@pytest.fixture(scope="module")
def large_model(tmp_path_factory) -> Iterator[tuple[Path, Path]]:
    """A model of 200 MB, which takes long enough to save that a signal can arrive in time, and a plan for it."""
    folder = tmp_path_factory.mktemp("large")
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=2**15,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    scores = {block.name: torch.arange(block.size) % 7 for block in nirvana.describe(config).blocks}
    nirvana.allocate(scores, config, sparsity=0.2).save(folder / "plan.json")
    yield folder / "model", folder / "plan.json"
    shutil.rmtree(folder)


def signal_when(appears: Callable[[], bool], number: signal.Signals, *arguments: object) -> Outcome:
    """Run a command and send it a signal as soon as something is there."""
    process = subprocess.Popen(
        cli_command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=_gives_way,
    )
    deadline = time.monotonic() + 60
    while not appears():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it never appeared"
        time.sleep(0.001)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    return Outcome(process.returncode, stdout, stderr)


def _gives_way() -> None:
    # A shell that runs tests in the background lets them ignore Ctrl-C, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # On a busy machine the command is not to be done before this process has looked.
    os.nice(19)


def partial_folders(target: Path) -> list[Path]:
    return list(target.parent.glob(f".{target.name}.partial-*"))


def weights_begun(target: Path) -> bool:
    return any(file.stat().st_size for folder in partial_folders(target) for file in folder.glob("*.safetensors"))


def test_ctrl_c_while_saving(large_model, tmp_path):
    """As early as can be: the temporary folder has only just been made."""
    model, _ = large_model
    command = ("prune", model, "--sparsity", 0.2, "--criterion", "random", "--out", tmp_path / "result")
    outcome = signal_when(lambda: bool(partial_folders(tmp_path / "result")), signal.SIGINT, *command)
    assert_refused(outcome, "prune", ("interrupted", "nothing was written"), code=130)
    assert list(tmp_path.iterdir()) == []


def test_a_polite_kill_while_overwriting_keeps_the_old_checkpoint(large_model, llama_folder, tmp_path):
    model, plan = large_model
    shutil.copytree(llama_folder, tmp_path / "result")
    before = listing(tmp_path)
    command = ("apply", model, "--plan", plan, "--overwrite", "--out", tmp_path / "result")
    outcome = signal_when(lambda: weights_begun(tmp_path / "result"), signal.SIGTERM, *command)
    assert_refused(outcome, "apply", ("interrupted", "nothing was written"), code=130)
    assert listing(tmp_path) == before
    nirvana.load(tmp_path / "result", device="cpu")


def test_a_hard_kill_leaves_nothing_that_looks_finished(large_model, cli_here, tmp_path):
    model, plan = large_model
    command = ("apply", model, "--plan", plan, "--out", tmp_path / "result")
    outcome = signal_when(lambda: weights_begun(tmp_path / "result"), signal.SIGKILL, *command)
    assert outcome.code == -signal.SIGKILL
    # Nobody could tidy up: the temporary folder stays, hidden and without what makes a checkpoint.
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".result.partial-")
    assert not (left / "config.json").exists()
    with pytest.raises(nirvana.NirvanaError):
        nirvana.load(left)
    assert_refused(cli_here("info", left), "info")
    # And it is in nobody's way.
    assert cli_here(*command).code == 0
    shutil.rmtree(tmp_path / "result")


def test_ctrl_c_while_evaluating_says_that_the_checkpoint_is_there(writers, tmp_path, out):
    (tmp_path / "text.txt").write_text("the sea the sea " * 100)
    evaluation = ("--evaluate", "--text", tmp_path / "text.txt", "--window", 32)
    outcome = signal_when(out.exists, signal.SIGINT, *writers["prune"], *evaluation, "--out", out)
    assert_refused(outcome, "prune", ("interrupted",), code=130)
    assert "nothing was written" not in outcome.stderr
    nirvana.load(out, device="cpu")
