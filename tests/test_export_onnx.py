"""ONNX exports, executed by ONNX Runtime and compared with torch."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from families import CONFIGS, build, inputs, logits, random_plan, uniform_plan
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

import nirvana
from nirvana import NirvanaError
from nirvana.export import onnx as exporter
from nirvana.export.onnx import export_onnx
from nirvana.export.onnx import trace as tracing

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from nirvana.export.onnx.generate import Decoder

#: Largest difference of logits of size one in fp32: sums in another order.
LIMIT = 1e-5
UNEQUAL = ("llama", "mistral", "qwen2", "qwen3", "qwen3-tied")
UNIFORM = ("llama-biases", "mistral", "qwen2-tied", "qwen3", "qwen3-tied")

pytestmark = pytest.mark.usefixtures("one_thread")


def pruned(name: str, uniform: bool) -> PreTrainedModel:
    """Two layers of unequal widths, or one, which is enough where all are equal: tracing takes seconds a layer."""
    config = copy.deepcopy(CONFIGS[name])
    config.num_hidden_layers = 1 if uniform else 2
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    model = build(config, seed=5)
    plan = uniform_plan(model, 2, 24, seed=5) if uniform else random_plan(model, seed=5)
    return nirvana.apply(model, plan)


def kv_heads(model: PreTrainedModel) -> list[int]:
    return [layer.self_attn.k_proj.out_features // layer.self_attn.head_dim for layer in model.model.layers]


@pytest.fixture(scope="module", params=UNEQUAL)
def unequal(request, tmp_path_factory) -> tuple[PreTrainedModel, Decoder]:
    """A pruned model, and its export with cache."""
    model = pruned(request.param, uniform=False)
    assert len(set(kv_heads(model))) == 2
    folder = tmp_path_factory.mktemp("onnx")
    model.save_pretrained(folder / "checkpoint")
    return model, Decoder(export_onnx(folder / "checkpoint", folder / "onnx"), threads=1)


def assert_same(found: np.ndarray, model: PreTrainedModel, arguments: dict) -> None:
    mask = arguments["attention_mask"].bool()
    torch.testing.assert_close(torch.from_numpy(found)[mask], logits(model, arguments), atol=LIMIT, rtol=0)


def numpy_inputs(arguments: dict) -> tuple[np.ndarray, np.ndarray]:
    return arguments["input_ids"].numpy(), arguments["attention_mask"].numpy()


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 19), (3, 11)])
def test_a_prompt_gives_the_logits_of_torch(unequal, batch, length):
    """From an empty past, alone or in a batch padded on the left."""
    model, decoder = unequal
    arguments = inputs(model, seed=batch, batch=batch, length=length)
    found, past = decoder.forward(*numpy_inputs(arguments))
    assert_same(found, model, arguments)
    assert [value.shape[1] for value in past.values()][::2] == kv_heads(model)


@pytest.mark.parametrize("first", [1, 7, 18])
def test_a_text_in_two_parts_gives_the_logits_of_the_whole(unequal, first):
    model, decoder = unequal
    arguments = inputs(model, seed=7, batch=3)
    tokens, mask = numpy_inputs(arguments)
    start, past = decoder.forward(tokens[:, :first], mask[:, :first])
    rest, _ = decoder.forward(tokens[:, first:], mask, past)
    assert_same(np.concatenate([start, rest], axis=1), model, arguments)


def test_greedy_text_is_that_of_torch(unequal):
    model, decoder = unequal
    for batch in (1, 3):
        arguments = inputs(model, seed=9, batch=batch, length=9)
        theirs = model.generate(**arguments, max_new_tokens=24, do_sample=False, eos_token_id=None)[:, 9:]
        assert decoder.generate(*numpy_inputs(arguments), 24).tolist() == theirs.tolist()


def test_logits_of_the_last_tokens_alone(unequal):
    _, decoder = unequal
    tokens, mask = np.arange(3, 23).reshape(2, 10), np.ones((2, 10), np.int64)
    every, _ = decoder.forward(tokens, mask)
    assert every.shape[1] == 10
    for count in (1, 4, 10, 99):
        some, _ = decoder.forward(tokens, mask, num_logits=count)
        np.testing.assert_array_equal(some, every[:, -count:])


def test_the_graph_has_the_usual_names(unequal):
    model, decoder = unequal
    taken = decoder.session.get_inputs()
    each = [f"{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    assert [v.name for v in taken[:3]] == ["input_ids", "attention_mask", "position_ids"]
    assert [v.name for v in taken[3:]] == [f"past_key_values.{name}" for name in each]
    assert [v.name for v in decoder.session.get_outputs()] == ["logits", *(f"present.{name}" for name in each)]
    assert [v.name for v in decoder.session.get_overridable_initializers()] == ["num_logits_to_keep"]
    assert taken[0].shape == ["batch_size", "sequence_length"]
    assert taken[1].shape == ["batch_size", "total_sequence_length"]
    head_dim = model.model.layers[1].self_attn.head_dim
    assert taken[5].shape == ["batch_size", kv_heads(model)[1], "past_sequence_length", head_dim]


@pytest.mark.parametrize("name", UNIFORM)
def test_uniform_widths_without_cache(name, tmp_path):
    model = pruned(name, uniform=True)
    model.save_pretrained(tmp_path / "checkpoint")
    decoder = Decoder(export_onnx(tmp_path / "checkpoint", tmp_path / "onnx", cache=False), threads=1)
    assert [v.name for v in decoder.session.get_inputs()] == ["input_ids", "attention_mask", "position_ids"]
    for batch, length in ((1, 1), (3, 11)):
        arguments = inputs(model, seed=batch, batch=batch, length=length)
        assert_same(decoder.forward(*numpy_inputs(arguments))[0], model, arguments)
    theirs = model.generate(**arguments, max_new_tokens=8, do_sample=False, eos_token_id=None)[:, 11:]
    assert decoder.generate(*numpy_inputs(arguments), 8).tolist() == theirs.tolist()


@pytest.fixture(scope="module")
def exported(tmp_path_factory, llama_folder, plan_file) -> tuple[Path, Path]:
    """A pruned checkpoint with tokenizer, and its export in float16 with weights in a file of their own."""
    folder = tmp_path_factory.mktemp("exported")
    checkpoint = nirvana.apply_checkpoint(llama_folder, nirvana.PruningPlan.load(plan_file), folder / "checkpoint")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter, "EMBEDDED_BYTES", 1000)
        return checkpoint, export_onnx(checkpoint, folder / "onnx", dtype="float16")


def test_the_folder_is_whole_and_says_nothing_of_this_machine(exported):
    checkpoint, folder = exported
    names = {file.name for file in folder.iterdir()}
    expected = {"model.onnx", "model.onnx_data", "config.json", "generation_config.json", "generate.py"}
    assert expected | {"tokenizer.json", "tokenizer_config.json"} == names
    theirs = nirvana.load(checkpoint)
    assert (folder / "model.onnx_data").stat().st_size >= 0.9 * 2 * theirs.num_parameters()
    assert (folder / "model.onnx").stat().st_size < 500_000
    assert b"site-packages" not in (folder / "model.onnx").read_bytes()
    assert AutoConfig.from_pretrained(folder).per_layer_config[1].intermediate_size == (
        theirs.config.per_layer_config[1].intermediate_size
    )


def test_the_loop_in_the_folder_runs_where_torch_is_missing(exported):
    checkpoint, folder = exported
    prompt = "I had begun to think that"
    # None in sys.modules makes an import fail as if nothing were installed.
    code = (
        "import runpy, sys; sys.modules.update(torch=None, nirvana=None, transformers=None); "
        f"sys.argv = ['generate.py', {prompt!r}, '--tokens', '12', '--threads', '1']; "
        f"runpy.run_path({str(folder / 'generate.py')!r}, run_name='__main__')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = nirvana.load(checkpoint, dtype="float16")
    arguments = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    made = model.generate(**arguments, max_new_tokens=12, do_sample=False)
    assert run.stdout == tokenizer.decode(made[0], skip_special_tokens=True) + "\n"


def test_generation_stops_at_the_end_token(exported):
    decoder = Decoder(exported[1], threads=1)
    tokens = np.array([[5, 6, 7]])
    free = decoder.generate(tokens, np.ones_like(tokens), 6)[0].tolist()
    stop = free[3]
    assert decoder.generate(tokens, np.ones_like(tokens), 6, [stop])[0].tolist() == free[: free.index(stop) + 1]


@pytest.fixture
def prepared(monkeypatch):
    """Exports take a prepared graph: what is tested is the folder."""
    import onnx_ir as ir

    value = ir.val("x", ir.DataType.FLOAT, (1,))
    graph = ir.Graph([value], [value], nodes=[], opset_imports={"": 18})
    monkeypatch.setattr(tracing, "trace", lambda model, cache: ir.Model(graph, ir_version=10))


@pytest.mark.usefixtures("prepared")
def test_an_export_is_replaced_only_on_request_and_nothing_else_is(llama_folder, tmp_path):
    folder = export_onnx(llama_folder, tmp_path / "onnx")
    with pytest.raises(NirvanaError, match="exists"):
        export_onnx(llama_folder, folder)
    (folder / "generate.py").unlink()
    export_onnx(llama_folder, folder, overwrite=True)
    assert (folder / "generate.py").is_file()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear")
    with pytest.raises(NirvanaError, match="something other"):
        export_onnx(llama_folder, tmp_path / "mine", overwrite=True)
    with pytest.raises(NirvanaError, match="not overwritten"):
        export_onnx(llama_folder, llama_folder, overwrite=True)


@pytest.mark.usefixtures("prepared")
def test_nothing_is_left_of_an_export_that_fails(llama_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(exporter, "LOOP", tmp_path / "missing.py")
    with pytest.raises(NirvanaError, match="nothing was written"):
        export_onnx(llama_folder, tmp_path / "deep" / "onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_missing_packages_are_named_with_the_remedy(llama_folder, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(NirvanaError, match=rf"needs {package}: pip install 'nirvana\[onnx\]'"):
        export_onnx(llama_folder, tmp_path / "onnx")


def test_an_encoder_decoder_is_refused(t5_folder, tmp_path):
    with pytest.raises(NirvanaError, match="of type t5, an encoder-decoder; ONNX export knows decoders only"):
        export_onnx(t5_folder, tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_type_is_refused(llama_folder, tmp_path):
    with pytest.raises(NirvanaError, match="'bfloat16' is not possible; use one of float32, float16"):
        export_onnx(llama_folder, tmp_path / "onnx", dtype="bfloat16")
