"""GGUF files in a real llama.cpp against the same model in torch: unequal and equal widths of every decoder family."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from families import CONFIGS, build, random_plan, uniform_plan
from gguf import GGUFReader
from gguf.quants import dequantize
from llamacpp import LlamaCpp
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel

import nirvana
from nirvana.allocation import make_plan
from nirvana.export.gguf.types import TYPES

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
    model = nirvana.load(folder, device="cpu", dtype="float32")
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
    ("qwen2", 2, {}, "deci"),
    ("qwen2", "dense", {"rope_parameters": YARN}, "qwen2"),
    ("qwen2", "dense", {"rope_parameters": CONFIGS["llama"].rope_parameters}, "deci"),
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
    assert difference(folder, made.path) < 1e-5


@pytest.mark.parametrize(("name", "changes"), [("mistral", {}), ("qwen2", {"use_sliding_window": True})])
def test_a_sliding_window_is_exact_up_to_its_length(tmp_path, tokenizer, name, changes):
    model = build(configuration(name, sliding_window=16, **changes), seed=3)
    folder = write(tmp_path, model, tokenizer, random_plan(model, seed=1))
    made = nirvana.export(folder, "gguf", tmp_path / "model.gguf", type="f32", context_length=16)
    assert GGUFReader(made.path).get_field("deci.context_length").contents() == 16
    assert difference(folder, made.path, PROMPT[:8], 8) < 1e-5


def wide(tokenizer, folder: Path, neurons: int) -> Path:
    """A model whose MLPs have 256 and `neurons` neurons, in bfloat16 as most checkpoints."""
    changes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    model = build(configuration("llama-tied", intermediate_size=256, num_hidden_layers=2, **changes), seed=3)
    kept = {block.name: tuple(range(block.size)) for block in nirvana.describe(model).blocks}
    kept["model.layers.1.mlp"] = tuple(range(neurons))
    return write(folder, model.bfloat16(), tokenizer, make_plan(nirvana.describe(model), kept, {}))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("neurons", [224, 200])
def test_types_round_as_the_format_says(tmp_path, tokenizer, kind, neurons):
    """The values in the file are those of the checkpoint, rounded; what the format cannot round is named."""
    folder = wide(tokenizer, tmp_path, neurons)
    made = nirvana.export(folder, "gguf", tmp_path / "model.gguf", type=kind)
    source = load_file(folder / "model.safetensors")
    # Steps between neighbouring values of the type, as a fraction of the largest in a block of 32.
    steps = {"f32": 0, "f16": 2**-10, "bf16": 0, "q8_0": 1 / 127, "q5_1": 2 / 31, "q5_0": 1 / 16, "q4_1": 2 / 15}
    step = steps.get(kind, 1 / 8)
    kinds = {}
    for tensor in GGUFReader(made.path).tensors:
        kinds[tensor.name] = tensor.tensor_type.name
        if tensor.name in ("blk.0.ffn_down.weight", "token_embd.weight"):
            values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
            name = "model.embed_tokens" if "embd" in tensor.name else "model.layers.0.mlp.down_proj"
            exact = source[f"{name}.weight"].float()
            largest = exact.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True).expand(-1, -1, 32).flatten(1)
            assert ((values - exact).abs() <= largest * step * 1.01).all()
            assert kind in ("f32", "bf16", "f16") or not torch.equal(values, exact)
    wanted = kind.upper()
    blocks = kind.startswith("q")
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    assert kinds["blk.0.ffn_down.weight"] == kinds["blk.1.ffn_up.weight"] == wanted
    assert kinds["blk.1.ffn_down.weight"] == ("F16" if blocks and neurons == 200 else wanted)
    assert kinds["token_embd.weight"] == ("Q8_0" if blocks else wanted), "it makes the logits as well"
    assert len(made.notes) == (blocks and neurons == 200)
    assert not made.notes or ("200" in made.notes[0] and "--align 32" in made.notes[0])
    # About three times what was measured. llama.cpp rounds activations as well, to 8 bits for the q types.
    limits = {"f32": 1e-5, "f16": 5e-3, "bf16": 0.05, "q8_0": 0.25, "q5_1": 1.2, "q5_0": 1.2, "q4_1": 2, "q4_0": 2}
    assert difference(folder, made.path, count=6) < limits[kind]


def test_a_gguf_file_is_a_source_as_well(tmp_path, tokenizer):
    folder = write(tmp_path, build(configuration("llama-tied"), seed=3), tokenizer)
    first = nirvana.export(folder, "gguf", tmp_path / "first.gguf", type="f32")
    # The tokenizer that transformers makes of the file has a token more than the model has rows.
    second = nirvana.export(first.path, "gguf", tmp_path / "second.gguf", type="f32")
    one, other = GGUFReader(first.path), GGUFReader(second.path)
    assert [tensor.name for tensor in one.tensors] == [tensor.name for tensor in other.tensors]
    for left, right in zip(one.tensors, other.tensors, strict=True):
        assert left.data.tobytes() == right.data.tobytes(), left.name


def test_the_command_line(cli_here, tmp_path, llama_folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(llama_folder, tmp_path / "small")
    code, stdout, stderr = cli_here("export", "small", "--format", "gguf", "--type", "Q8_0")
    assert (code, stderr) == (0, "")
    assert "architecture  llama\n" in stdout
    assert "note: 2 tensors stay F16: their rows (48) do not divide into blocks of 32" in stdout
    made = tmp_path / "small-q8_0.gguf"
    assert str(made) in stdout
    before = made.read_bytes()
    assert cli_here("export", "small", "--format", "gguf", "--type", "q8_0").code == 2
    outcome = cli_here("export", "small", "--format", "gguf", "--type", "q8_0", "--overwrite", "--json")
    assert (outcome.code, outcome.stderr) == (0, "")
    report = json.loads(outcome.stdout)
    assert (report["path"], report["bytes"]) == (str(made), len(before))
    assert (report["format"], report["architecture"], len(report["notes"])) == ("gguf", "llama", 1)
    assert made.read_bytes() == before, "the same checkpoint makes the same bytes"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small", "small-q8_0.gguf"]
