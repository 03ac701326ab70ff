"""nirvana check: every fault in one line, the same from load; and what opens a folder that is whole."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import Cli
from families import CONFIGS, build, random_plan, uniform_plan
from transformers import AutoConfig, PreTrainedModel

import nirvana
from nirvana import NirvanaError
from nirvana.checkpoint.modeling_pruned_decoder import PrunedQwen2Config
from nirvana.checkpoint.runtimes import Shape, tensor_parallel_sizes, transformers_builds

pytestmark = pytest.mark.usefixtures("one_thread")

INDEX = "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A Llama with unequal widths in several shards. Do not change."""
    folder = tmp_path_factory.mktemp("made")
    model = build(CONFIGS["llama"], seed=0)
    model.save_pretrained(folder / "dense")
    nirvana.apply_checkpoint(folder / "dense", random_plan(model, seed=0), folder / "small", shard_size="30KB")
    return folder


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """The same, to be damaged."""
    return Path(shutil.copytree(made / "small", tmp_path / "small"))


def shards(folder: Path) -> list[Path]:
    found = sorted(folder.glob("model-*.safetensors"))
    assert len(found) > 2
    return found


def edit(file: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def edit_tensors(folder: Path, name: str, change: Callable[[dict], object]) -> None:
    """Change the shard that holds `name`."""
    file = folder / json.loads((folder / INDEX).read_text())["weight_map"][name]
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})


def forget(folder: Path, name: str) -> None:
    """A tensor that neither file nor index holds."""
    edit_tensors(folder, name, lambda tensors: tensors.pop(name))
    edit(folder / INDEX, lambda index: index["weight_map"].pop(name))


def drop_units(plan: dict, index: int, count: int) -> None:
    plan["blocks"][index]["kept"] = plan["blocks"][index]["kept"][:-count]


#: What happened to the folder, and what the line must say.
FAULTS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no config": (lambda f: (f / "config.json").unlink(), ("config.json",)),
    "config cut short": (lambda f: (f / "config.json").write_text('{"model_type"'), ("config.json", "JSON")),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), ("config.json", "JSON object")),
    "unknown type": (
        lambda f: edit(f / "config.json", lambda c: (c.update(model_type="gyroscope"), c.pop("auto_map"))),
        ("config.json", "'gyroscope'", "llama", "qwen2"),
    ),
    "unsupported type": (lambda f: edit(f / "config.json", lambda c: c.update(model_type="gpt2")), ("gpt2", "llama")),
    "newer format": (
        lambda f: edit(f / "config.json", lambda c: c.update(pruned_format=2)),
        ("config.json", "pruned_format 2", "reads 1", "upgrade nirvana"),
    ),
    "no weights": (lambda f: [file.unlink() for file in [*shards(f), f / INDEX]], ("model.safetensors",)),
    "missing shard": (lambda f: shards(f)[1].unlink(), ("model-00002-of", "is missing", "whole checkpoint")),
    "shard cut short": (
        lambda f: shards(f)[1].write_bytes(shards(f)[1].read_bytes()[:-7]),
        ("model-00002-of", "truncated or damaged"),
    ),
    "shard is no safetensors": (lambda f: shards(f)[0].write_bytes(b"weights"), ("model-00001-of", "damaged")),
    "index cut short": (lambda f: (f / INDEX).write_text("{"), (INDEX, "not a weight index")),
    "index leads elsewhere": (
        lambda f: edit(f / INDEX, lambda i: i["weight_map"].update({UP: "../model-00001-of-00009.safetensors"})),
        (INDEX, "beside it"),
    ),
    "index promises too much": (
        lambda f: edit(f / INDEX, lambda i: i["weight_map"].update({"model.ghost": shards(f)[0].name})),
        ("model-00001-of", "model.ghost"),
    ),
    "tensor twice": (
        lambda f: edit_tensors(f, "model.norm.weight", lambda t: t.update({"lm_head.weight": torch.zeros(97, 48)})),
        ("lm_head.weight", "as well"),
    ),
    "missing tensor": (lambda f: forget(f, UP), ("no tensor", UP)),
    "missing norm": (lambda f: forget(f, "model.norm.weight"), ("no tensor model.norm.weight",)),
    "wrong shape": (
        lambda f: edit_tensors(f, UP, lambda t: t.update({UP: t[UP][:-1].clone()})),
        (UP, "has shape", "its configuration says"),
    ),
    "wrong shape of what is never cut": (
        lambda f: edit_tensors(f, "model.norm.weight", lambda t: t.update({"model.norm.weight": torch.ones(47)})),
        ("model.norm.weight has shape [47]", "[48]"),
    ),
    "config of other widths": (
        lambda f: edit(f / "config.json", lambda c: c["per_layer_config"]["1"].update(intermediate_size=36)),
        ("model.layers.1.mlp.", "has shape"),
    ),
    "plan cut short": (lambda f: (f / "nirvana_plan.json").write_text("{"), ("nirvana_plan.json", "JSON")),
    "newer plan": (
        lambda f: edit(f / "nirvana_plan.json", lambda p: p.update(version=2)),
        ("nirvana_plan.json", "plan version 2", "reads 1"),
    ),
    "plan of another family": (
        lambda f: edit(f / "nirvana_plan.json", lambda p: p.update(architecture="qwen3")),
        ("nirvana_plan.json", "'qwen3'", "'llama'"),
    ),
    "plan keeps fewer": (
        lambda f: edit(f / "nirvana_plan.json", lambda p: drop_units(p, 3, 1)),
        ("nirvana_plan.json", "model.layers.1.mlp", "of 37", "disagrees"),
    ),
    "plan of a deeper model": (
        lambda f: edit(
            f / "nirvana_plan.json", lambda p: p["blocks"].append(p["blocks"][0] | {"name": "model.layers.3.self_attn"})
        ),
        ("block model.layers.3.self_attn stands only in the plan",),
    ),
    "plan of a shallower model": (
        lambda f: edit(f / "nirvana_plan.json", lambda p: p["blocks"].pop()),
        ("block model.layers.2.mlp stands only in the model",),
    ),
    "plan of another hidden size": (
        lambda f: edit(f / "nirvana_plan.json", lambda p: p["totals"].update(prunable_after=1234)),
        ("nirvana_plan.json", "1,234 prunable parameters"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line_from_check_and_from_load(cli_here: Cli, folder, fault, monkeypatch):
    damage, says = FAULTS[fault]
    damage(folder)
    outcome = cli_here("check", folder)
    assert (outcome.code, outcome.stdout) == (2, "")
    (line,) = outcome.stderr.splitlines()
    assert [fragment for fragment in says if fragment not in line] == [], line

    # load says the same words, before any model is built.
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("a model was built"))
    with pytest.raises(NirvanaError) as error:
        nirvana.load(folder)
    assert line == f"nirvana check: {' '.join(str(error.value).split())}"


def test_a_folder_called_demo_is_a_folder(made, tmp_path, monkeypatch):
    shutil.copytree(made / "small", tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    assert nirvana.check("demo").model_type == "pruned_llama"


def test_no_folder_is_refused(cli_here, tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("nothing", "file"):
        outcome = cli_here("check", tmp_path / name)
        assert (outcome.code, outcome.stdout) == (2, "")
        assert "no folder" in outcome.stderr


# Contents


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


CHANGES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "weight": (lambda f: flip(shards(f)[1]), ("model-00002-of", "not what was written")),
    "class file": (lambda f: flip(f / "modeling_pruned_decoder.py"), ("modeling_pruned_decoder.py",)),
    "lost file": (lambda f: (f / "generation_config.json").unlink(), ("generation_config.json is missing",)),
    "list": (lambda f: (f / "SHA256SUMS").write_text("abc  model.safetensors\n"), ("SHA256SUMS is damaged",)),
    "list leads elsewhere": (
        lambda f: (f / "SHA256SUMS").write_text("0" * 64 + "  ../secret\n"),
        ("SHA256SUMS is damaged",),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_content_is_found_by_its_hash(cli_here, folder, change):
    damage, says = CHANGES[change]
    damage(folder)
    assert cli_here("check", folder).code == 0  # the headers are right
    outcome = cli_here("check", folder, "--hashes")
    assert (outcome.code, outcome.stdout) == (2, "")
    (line,) = outcome.stderr.splitlines()
    assert [fragment for fragment in says if fragment not in line] == [], line


def test_hashes_are_those_of_sha256sum(made):
    files = {file.name for file in (made / "small").iterdir()} - {"SHA256SUMS"}
    done = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=made / "small", capture_output=True)
    assert done.returncode == 0, done.stderr
    assert {line.removesuffix(": OK") for line in done.stdout.decode().splitlines()} == files
    assert nirvana.check(made / "small", hashes=True).hashed == len(files)
    assert nirvana.check(made / "small").hashed is None


# Whole folders


def opening(report: nirvana.CheckReport) -> dict[str, bool]:
    return {opener.runtime: opener.opens for opener in report.openers}


def needs(report: nirvana.CheckReport) -> dict[str, str]:
    return {opener.runtime: opener.needs for opener in report.openers}


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> Callable[[str, bool], nirvana.CheckReport]:
    def make(name: str, uniform: bool) -> nirvana.CheckReport:
        parent = tmp_path_factory.mktemp(name)
        model = build(CONFIGS[name], seed=0)
        model.save_pretrained(parent / "dense")
        plan = uniform_plan(model, 2, 32, seed=0) if uniform else random_plan(model, seed=0)
        return nirvana.check(nirvana.apply_checkpoint(parent / "dense", plan, parent / "small"), hashes=True)

    return make


EVERYWHERE = {
    "transformers with nirvana",
    "transformers alone",
    "vLLM",
    "vLLM, Transformers backend",
    "SGLang",
    "llama.cpp",
    "ONNX Runtime",
}
TRANSFORMERS = {"transformers with nirvana", "transformers alone"}


@pytest.mark.parametrize(
    ("name", "uniform", "not_by", "gguf"),
    [
        ("llama", True, set(), "llama"),
        ("llama", False, {"SGLang"}, "deci"),
        ("mistral", True, set(), "llama"),
        ("mistral", False, {"SGLang"}, "deci"),
        ("qwen2-tied", False, {"SGLang"}, "deci"),
        # With attention_bias, which neither reads at the output.
        ("qwen3", True, {"llama.cpp", "vLLM"}, None),
        ("qwen3", False, {"SGLang", "llama.cpp", "vLLM"}, None),
        ("qwen3-tied", True, set(), "qwen3"),
        ("qwen3-tied", False, {"SGLang"}, "openelm"),
        ("t5", True, EVERYWHERE - TRANSFORMERS, None),
        ("t5-gated", False, EVERYWHERE - TRANSFORMERS, None),
    ],
)
def test_what_opens_a_folder(reports, name, uniform, not_by, gguf):
    report = reports(name, uniform)
    assert report.notes == ()
    assert opening(report) == {runtime: runtime not in not_by for runtime in EVERYWHERE}
    said = needs(report)
    assert said["transformers alone"] == "nothing" if uniform else "trust_remote_code" in said["transformers alone"]
    if gguf:
        assert f"(architecture {gguf})" in said["llama.cpp"]


def test_it_prints_a_table_and_json(cli_here, made):
    text = cli_here("check", made / "small")
    assert (text.code, text.stderr) == (0, "")
    assert "is whole: pruned_llama" in text.stdout
    assert all(runtime in text.stdout for runtime in EVERYWHERE)
    report = json.loads(cli_here("check", made / "small", "--json").stdout)
    assert {entry["runtime"] for entry in report["openers"]} == EVERYWHERE
    assert report["tensors"] == len(json.loads((made / "small" / INDEX).read_text())["weight_map"])
    assert report["bytes"] == json.loads((made / "small" / INDEX).read_text())["metadata"]["total_size"]
    assert report["tensor_parallel"] == [1]


def test_code_in_the_folder_is_not_run_but_mentioned(folder, tmp_path):
    (folder / "modeling_pruned_decoder.py").write_text(f"open({str(tmp_path / 'it-ran')!r}, 'w')\n")
    report = nirvana.check(folder)
    assert [note for note in report.notes if "before you trust it" in note]
    assert not (tmp_path / "it-ran").exists()


def test_a_missing_class_file_closes_two_ways(folder):
    (folder / "modeling_pruned_decoder.py").unlink()
    report = nirvana.check(folder)
    closed = {runtime for runtime, opens in opening(report).items() if not opens}
    assert closed == {"transformers alone", "vLLM, Transformers backend", "SGLang"}
    nirvana.load(folder)


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda f: (f / "nirvana_plan.json").unlink(), "no nirvana_plan.json"),
        (lambda f: (f / "SHA256SUMS").unlink(), "no SHA256SUMS"),
        (lambda f: shutil.copy(shards(f)[0], f / "old.safetensors"), "old.safetensors belongs to no index"),
        (
            lambda f: edit(f / "config.json", lambda c: c.update(transformers_version="99.0.0")),
            "written with transformers 99.0.0",
        ),
    ],
)
def test_what_is_no_fault_is_a_note(folder, change, note):
    (folder / "SHA256SUMS").unlink() if "SHA" not in note else None
    change(folder)
    report = nirvana.check(folder, hashes=True)
    assert [line for line in report.notes if note in line]
    nirvana.load(folder)


def test_a_plan_beside_the_weights_it_is_for(made, tmp_path):
    folder = Path(shutil.copytree(made / "dense", tmp_path / "dense"))
    shutil.copy(made / "small" / "nirvana_plan.json", folder)
    assert [note for note in nirvana.check(folder).notes if "is not applied" in note]
    nirvana.load(folder)


def test_attention_left_whole_is_what_sglang_lacks_a_class_for(tmp_path):
    model = build(CONFIGS["llama"], seed=0)
    model.save_pretrained(tmp_path / "dense")
    scores = {b.name: torch.arange(b.size) * (1.0 + i) for i, b in enumerate(nirvana.describe(model).blocks)}
    plan = nirvana.allocate(scores, model, sparsity=0.3, scope="mlp", align=4)
    report = nirvana.check(nirvana.apply_checkpoint(tmp_path / "dense", plan, tmp_path / "small"))
    assert "SGLANG_EXTERNAL_MODEL_PACKAGE" in needs(report)["SGLang"]


def shape(heads: list[int], groups: list[int], neurons: list[int]) -> Shape:
    return Shape(CONFIGS["llama"], "llama", True, tuple(heads), tuple(groups), tuple(neurons), None)


@pytest.mark.parametrize(
    ("heads", "groups", "neurons", "sizes"),
    [
        ([9, 9], [3, 3], [1536, 1536], [1]),
        ([8, 8], [4, 4], [64, 64], [1, 2, 4, 8]),
        ([8, 4], [2, 1], [64, 64], [1, 2, 4]),
        ([8, 6], [4, 3], [64, 64], [1]),  # 3 key/value heads exclude 2 devices
        ([8, 8], [4, 4], [64, 62], [1, 2]),
        ([16, 16], [1, 1], [64, 64], [1, 2, 4, 8, 16]),
    ],
)
def test_tensor_parallel_sizes(heads, groups, neurons, sizes):
    assert tensor_parallel_sizes(shape(heads, groups, neurons)) == sizes


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "t5"])
def test_transformers_does_not_build_these_layers_itself(name):
    """Fails on the day that it does: `check` then says so, and the documents must, too."""
    model = build(CONFIGS[name], seed=0)
    config = nirvana.describe(model).pruned_config(random_plan(model, seed=0).kept)
    assert config.model_type == f"pruned_{CONFIGS[name].model_type}"
    assert not transformers_builds(config)


def test_transformers_builds_layers_that_do_not_differ():
    settings = CONFIGS["qwen2"].to_dict()
    settings.pop("model_type")
    assert transformers_builds(PrunedQwen2Config(**settings))


def test_the_dense_source_is_checked_as_well(made):
    report = nirvana.check(made / "dense")
    assert report.model_type == AutoConfig.from_pretrained(made / "dense").model_type == "llama"
    assert opening(report)["SGLang"]
