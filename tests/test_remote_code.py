"""One directory, two ways in: its own class file with trust and without nirvana; nirvana's classes without trust."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from families import CONFIGS, build, inputs, logits, random_plan, uniform_plan
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedModel,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import logging

import nirvana
from nirvana.allocation import make_plan
from nirvana.checkpoint.registration import register_pruned_types
from nirvana.parameters import auto_class

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("llama", "llama-tied", "mistral", "qwen2", "qwen3-tied", "t5", "t5-gated")

#: Opens each folder by its own class file, with nirvana out of reach, and leaves there what it computes.
REMOTE_PROCESS = """
import importlib.util, json, sys
sys.modules["nirvana"] = None  # an installed copy must not help
assert importlib.util.find_spec("nirvana") is None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.utils import logging
torch.set_num_threads(1)
logging.disable_progress_bar()
for folder in json.load(sys.stdin):
    trust = {"trust_remote_code": True}
    config = AutoConfig.from_pretrained(folder, **trust)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model, report = auto.from_pretrained(folder, output_loading_info=True, **trust)
    assert not any(report.values()), (folder, report)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    backbone = AutoModel.from_pretrained(folder, **trust)
    assert type(backbone).__name__ == type(model).__name__.replace("ForCausalLM", "Model").replace(
        "ForConditionalGeneration", "Model"), type(backbone)
    given = load_file(folder + "/inputs.safetensors")
    prompt = {key: value for key, value in given.items() if key != "decoder_input_ids"}
    computed = {}
    with torch.no_grad():
        computed["logits"] = model.eval()(**given, use_cache=False).logits
        options = dict(do_sample=False, max_new_tokens=9, min_new_tokens=9, pad_token_id=0, no_repeat_ngram_size=2)
        computed["greedy"] = model.generate(**prompt, **options)
        computed["static"] = model.generate(**prompt, cache_implementation="static", **options)
        computed["beam"] = model.generate(**prompt, num_beams=3, **options)
        model.set_attn_implementation("eager")
        computed["eager"] = model(**given, use_cache=False).logits
    model.set_attn_implementation("sdpa")
    for key, trusted in (("ids", True), ("ids of no trust", False)):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
        computed[key] = torch.tensor(tokenizer("The monster, 3 naive 1024\\n\\n    x").input_ids)
    save_file({key: value.clone() for key, value in computed.items()}, folder + "/computed.safetensors")
    # Saved, opened and saved again: the class file goes with it.
    model.save_pretrained(folder + "-once")
    once = auto.from_pretrained(folder + "-once", **trust)
    once.save_pretrained(folder + "-twice")
    backbone.save_pretrained(folder + "-backbone")
assert not any(name.startswith("nirvana.") for name in sys.modules)
"""


class Opened:
    """The pruned model in memory and its folder, opened, run and saved by a process without nirvana."""

    def __init__(self, folder: Path, small: PreTrainedModel, arguments: dict[str, Tensor]):
        self.folder, self.small, self.arguments = folder, small, arguments

    def computed(self, key: str) -> Tensor:
        return safetensors.torch.load_file(self.folder / "computed.safetensors")[key]

    def saved(self, what: str) -> Path:
        return self.folder.with_name(f"{self.folder.name}-{what}")


@pytest.fixture(scope="module")
def opened(tmp_path_factory, tokenizer) -> dict[str, Opened]:
    parent = tmp_path_factory.mktemp("remote")
    made = {}
    for name in NAMES:
        model = build(CONFIGS[name], seed=0)
        model.save_pretrained(parent / "dense" / name)
        tokenizer.save_pretrained(parent / "dense" / name)
        plan = random_plan(model, seed=0)
        folder = nirvana.apply_checkpoint(parent / "dense" / name, plan, parent / name)
        arguments = inputs(model, seed=0)  # two rows, one padded on the left
        safetensors.torch.save_file(arguments, folder / "inputs.safetensors")
        made[name] = Opened(folder, nirvana.apply(model, plan), arguments)
    process = subprocess.run(
        [sys.executable, "-I", "-c", REMOTE_PROCESS],
        input=json.dumps([str(one.folder) for one in made.values()]),
        env={**os.environ, "HF_MODULES_CACHE": str(parent / "modules")},
        cwd=parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return made


def generated(one: Opened, **options) -> Tensor:
    prompt = {key: value for key, value in one.arguments.items() if key != "decoder_input_ids"}
    settings = {"do_sample": False, "max_new_tokens": 9, "min_new_tokens": 9, "pad_token_id": 0}
    return one.small.generate(**prompt, **settings, no_repeat_ngram_size=2, **options)


@pytest.mark.parametrize("name", NAMES)
def test_without_nirvana_it_computes_the_same(opened, name):
    one = opened[name]
    with torch.no_grad():
        expected = one.small(**one.arguments, use_cache=False).logits
    torch.testing.assert_close(one.computed("logits"), expected, rtol=0, atol=1e-6)
    real = ... if "decoder_input_ids" in one.arguments else one.arguments["attention_mask"].bool()
    torch.testing.assert_close(one.computed("eager")[real], expected[real], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_without_nirvana_it_generates_the_same(opened, name):
    one = opened[name]
    greedy = generated(one)
    assert greedy.shape[0] == 2
    assert torch.equal(one.computed("greedy"), greedy)
    assert torch.equal(one.computed("static"), greedy)
    assert torch.equal(one.computed("beam"), generated(one, num_beams=3))


@pytest.mark.parametrize("name", NAMES)
def test_token_ids_are_the_same_with_and_without_trust(opened, name, tokenizer):
    expected = tokenizer("The monster, 3 naive 1024\n\n    x").input_ids
    for key in ("ids", "ids of no trust"):
        assert opened[name].computed(key).tolist() == expected
    assert (
        AutoTokenizer.from_pretrained(opened[name].folder)("The monster, 3 naive 1024\n\n    x").input_ids == expected
    )


def same_bits(model: PreTrainedModel, expected: PreTrainedModel) -> bool:
    mine, others = model.state_dict(), expected.state_dict()
    return mine.keys() == others.keys() and all(torch.equal(mine[key], others[key]) for key in mine)


@pytest.mark.parametrize("what", ["once", "twice"])
@pytest.mark.parametrize("name", NAMES)
def test_saved_without_nirvana_it_is_the_same_directory(opened, name, what):
    one = opened[name]
    folder = one.saved(what)
    assert same_bits(nirvana.load(folder), one.small)
    theirs, ours = (json.loads((path / "config.json").read_text()) for path in (folder, one.folder))
    for config in (theirs, ours):
        config.pop("tie_word_embeddings", None)  # transformers writes every T5 as tied
    assert theirs == ours
    code = next(one.folder.glob("*.py")).name
    assert (folder / code).read_bytes() == (one.folder / code).read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_saved_backbone_is_opened(opened, name):
    backbone = AutoModel.from_pretrained(opened[name].saved("backbone"))
    assert same_bits(
        backbone, getattr(opened[name].small, "model", None) or AutoModel.from_pretrained(opened[name].folder)
    )


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": False}, {"trust_remote_code": True}], ids=str)
@pytest.mark.parametrize("name", ["llama", "qwen2", "t5"])
def test_with_nirvana_it_opens_silently_by_nirvanas_classes(opened, name, trust, capfd, monkeypatch):
    """No prompt, no warning; and whoever passes trust all the same gets the installed classes, not the file's."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked for trust"))
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(opened[name].folder, **trust)
        model = auto_class(config).from_pretrained(opened[name].folder, **trust)
    finally:
        logging.enable_progress_bar()
    assert type(model).__module__.startswith("nirvana.checkpoint.modeling_pruned_")
    assert same_bits(model, opened[name].small)
    assert capfd.readouterr() == ("", "")


def test_the_file_in_the_directory_is_the_module_of_the_package(opened):
    package = Path(nirvana.__file__).parent / "checkpoint"
    for name in NAMES:
        (code,) = opened[name].folder.glob("*.py")
        assert code.read_bytes() == (package / code.name).read_bytes()
        auto_map = json.loads((opened[name].folder / "config.json").read_text())["auto_map"]
        head = "AutoModelForSeq2SeqLM" if name.startswith("t5") else "AutoModelForCausalLM"
        assert set(auto_map) == {"AutoConfig", "AutoModel", head}
        assert {reference.split(".")[0] for reference in auto_map.values()} == {code.stem}


@pytest.mark.parametrize("name", ["llama", "t5-gated"])
def test_model_of_the_class_file_is_pruned_again(opened, name, tmp_path, monkeypatch):
    """Its classes are not nirvana's own."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    folder, small = opened[name].folder, opened[name].small
    reference = json.loads((folder / "config.json").read_text())["auto_map"]
    model_class = get_class_from_dynamic_module(reference[auto_class(small.config).__name__], folder)
    model = model_class.from_pretrained(folder)
    assert type(model) is not type(small)
    plan = random_plan(small, seed=3)
    assert same_bits(nirvana.apply(model, plan), nirvana.apply(small, plan))


@pytest.mark.parametrize("groups", [None, 4], ids=["unequal", "uniform"])
def test_t5_with_a_head_of_its_own_says_so(tmp_path, groups):
    """Readers other than transformers 5 drop the head of a T5 that calls itself tied."""
    model = build(CONFIGS["t5-gated"], seed=0)
    model.save_pretrained(tmp_path / "dense")
    plan = random_plan(model, seed=0) if groups is None else uniform_plan(model, groups, 21, seed=0)
    folder = nirvana.apply_checkpoint(tmp_path / "dense", plan, tmp_path / "small")
    config = json.loads((folder / "config.json").read_text())
    assert (config["tie_word_embeddings"], config["scale_decoder_outputs"]) == (False, False)
    arguments = inputs(model, seed=0)
    with nirvana.masked(model, plan) as masked:
        expected = logits(masked, arguments)
    torch.testing.assert_close(logits(nirvana.load(folder), arguments), expected, rtol=0, atol=1e-5)


# Stepping aside


def test_a_name_that_transformers_brings_is_not_taken(monkeypatch):
    """As if a release had a pruned_llama of its own."""

    class Theirs(LlamaConfig):
        model_type = "pruned_llama"

    Theirs.__module__ = "transformers.models.pruned_llama.configuration_pruned_llama"
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "pruned_llama", Theirs)
    register_pruned_types()
    assert CONFIG_MAPPING["pruned_llama"] is Theirs
    assert CONFIG_MAPPING["pruned_qwen2"].__module__ == "nirvana.checkpoint.modeling_pruned_decoder"


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3-tied"])
def test_transformers_is_told_to_leave_our_layers_alone(opened, name):
    """What transformers will ask of every model with per-layer widths (its pull request 45332)."""
    for model in (opened[name].small, opened[name].small.model):
        assert model._disable_heterogeneous_modeling_patching
    assert not hasattr(build(CONFIGS[name], seed=0), "_disable_heterogeneous_modeling_patching")


# torch.compile


@pytest.fixture
def dynamo_limits():
    """What compile_layers raises, put back."""
    config = torch._dynamo.config
    torch.compiler.reset()
    with config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        yield config
    torch.compiler.reset()


def ten_widths() -> PreTrainedModel:
    """A Llama of ten layers, no two of them equally wide."""
    config = copy.deepcopy(CONFIGS["llama"])
    config.num_hidden_layers = 10
    model = build(config, seed=0)
    kept = {}
    for index, block in enumerate(nirvana.describe(model).blocks):
        layer = index // 2
        kept[block.name] = tuple(range(1 + layer % block.size if block.is_attention else block.size - layer))
    return nirvana.apply(model, make_plan(nirvana.describe(model), kept, {}))


@torch.no_grad()
def forward(model: nn.Module) -> Tensor:
    return model(**inputs(model, seed=0), use_cache=False).logits


def test_every_width_is_compiled(dynamo_limits):
    model, counter = ten_widths(), CompileCounter()
    expected = forward(model)
    assert nirvana.compile_layers(model, backend=counter) is model
    torch.testing.assert_close(forward(model), expected, rtol=0, atol=1e-6)
    assert counter.frame_count == 10
    assert dynamo_limits.recompile_limit == 80


def test_without_a_higher_limit_layers_stay_eager(dynamo_limits):
    """Why compile_layers raises it."""
    model, counter = ten_widths(), CompileCounter()
    for layer in model.model.layers:
        layer.compile(backend=counter)
    forward(model)
    assert counter.frame_count == 8


def test_limits_are_never_lowered(dynamo_limits):
    dynamo_limits.recompile_limit = dynamo_limits.accumulated_recompile_limit = 1000
    nirvana.compile_layers(ten_widths(), backend=CompileCounter())
    assert (dynamo_limits.recompile_limit, dynamo_limits.accumulated_recompile_limit) == (1000, 1000)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_whole_model_is_one_graph(opened, name, dynamo_limits):
    model, counter = opened[name].small, CompileCounter()
    arguments = opened[name].arguments
    with torch.no_grad():
        expected = model(**arguments, use_cache=False).logits
        compiled = torch.compile(model, backend=counter, fullgraph=True)(**arguments, use_cache=False).logits
    torch.testing.assert_close(compiled, expected, rtol=0, atol=1e-6)
    assert counter.frame_count == 1
