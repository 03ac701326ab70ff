"""Checkpoints: what is written, file to file as in memory, is what transformers reads, generates from and trains."""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from families import ALL, CONFIGS, DECODERS, GENERATING, build, inputs, logits, random_plan, uniform_plan
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel

import nirvana
from nirvana import NirvanaError, PruningPlan
from nirvana.checkpoint.atomic import atomic_directory, write_file
from nirvana.checkpoint.tensors import CheckpointTensors, ModelTensors, TensorInfo
from nirvana.checkpoint.writer import header, write_weights
from nirvana.parameters import auto_class
from nirvana.progress import Progress

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Case:
    """A dense model with its checkpoint `source`, a plan with unequal widths, and both ways of cutting. Not to change.

    Attributes:
        small: cut in memory.
        folder: checkpoint cut from file to file.
    """

    model: PreTrainedModel
    source: Path
    plan: PruningPlan
    small: PreTrainedModel
    folder: Path
    arguments: dict[str, Tensor]


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Callable[[str], Case]:
    """Family configuration -> its case, made once."""

    @functools.cache
    def make(name: str) -> Case:
        folder = tmp_path_factory.mktemp(name)
        model = build(CONFIGS[name], seed=0)
        model.save_pretrained(folder / "source")
        plan = random_plan(model, seed=0)
        nirvana.apply_checkpoint(folder / "source", plan, folder / "small")
        small = nirvana.apply(model, plan)
        return Case(model, folder / "source", plan, small, folder / "small", inputs(model, seed=0))

    return make


def assert_same_bits(model: PreTrainedModel, expected: PreTrainedModel) -> None:
    assert type(model) is type(expected)
    mine, others = model.state_dict(), expected.state_dict()
    assert mine.keys() == others.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == others[name].dtype, name
        assert torch.equal(tensor, others[name]), name


def config_json(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


# From file to file


@pytest.mark.parametrize("name", ALL)
def test_file_to_file_is_what_apply_makes(case, name):
    loaded = nirvana.load(case(name).folder)
    assert_same_bits(loaded, case(name).small)
    assert not loaded.training
    arguments = case(name).arguments
    torch.testing.assert_close(logits(loaded, arguments), logits(case(name).small, arguments), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_saved_by_transformers_it_is_the_same_checkpoint(case, name, tmp_path):
    case(name).small.save_pretrained(tmp_path)
    assert_same_bits(nirvana.load(tmp_path), case(name).small)
    theirs, ours = config_json(tmp_path), config_json(case(name).folder)
    # transformers writes every T5 as tied, whatever its head is.
    assert theirs.pop("tie_word_embeddings", None) == (ours.pop("tie_word_embeddings", None) or name == "t5-gated")
    assert theirs == ours
    mine = safetensors.torch.load_file(case(name).folder / "model.safetensors")
    theirs = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.mark.parametrize("name", ALL)
def test_auto_class_finds_every_tensor_and_no_other(case, name):
    config = AutoConfig.from_pretrained(case(name).folder)
    loaded, report = auto_class(config).from_pretrained(case(name).folder, output_loading_info=True)
    assert not any(report.values()), report
    assert_same_bits(loaded, case(name).small)


@pytest.mark.parametrize("name", DECODERS)
def test_auto_model_opens_the_backbone(case, name):
    backbone = AutoModel.from_pretrained(case(name).folder)
    assert_same_bits(backbone, case(name).small.model)


@pytest.mark.parametrize("name", ALL)
def test_configuration_holds_the_widths_of_every_layer(case, name):
    config = AutoConfig.from_pretrained(case(name).folder)
    widths = {block.name: block.size for block in nirvana.describe(config).blocks}
    assert widths == {block: len(units) for block, units in case(name).plan.kept.items()}


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_folder_holds_the_plan(case, name):
    files = {file.name for file in case(name).folder.iterdir()}
    code = "modeling_pruned_t5.py" if name == "t5" else "modeling_pruned_decoder.py"
    written = {"config.json", "generation_config.json", "model.safetensors", "nirvana_plan.json", "SHA256SUMS"}
    assert files == written | {code}
    stored = PruningPlan.load(case(name).folder)
    assert stored.kept == case(name).plan.kept
    assert stored.totals == case(name).plan.totals
    assert (case(name).folder / "nirvana_plan.json").read_text() == case(name).plan.to_json()


@pytest.mark.parametrize("name", ALL)
def test_model_in_memory_names_its_tensors_as_its_checkpoint_does(case, name):
    """Shared ones once, under the name that transformers writes."""
    assert ModelTensors(case(name).model).info() == CheckpointTensors(case(name).source).info()


@pytest.mark.parametrize("name", ["llama-tied", "t5-gated"])
def test_small_shards_on_both_sides(case, name, tmp_path):
    case(name).model.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 3
    out = nirvana.apply_checkpoint(tmp_path / "source", case(name).plan, tmp_path / "small", shard_size="10KB")
    shards = sorted(file.name for file in out.glob("*.safetensors"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(shards) > 3
    assert sorted(set(index["weight_map"].values())) == shards
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    tensors = [t for shard in shards for t in safetensors.torch.load_file(out / shard).values()]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors)
    for shard in shards:
        tensors = safetensors.torch.load_file(out / shard).values()
        # A tensor larger than a shard has one of its own.
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors) <= 10_000
    assert_same_bits(nirvana.load(out), case(name).small)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_types_of_the_source_are_kept(case, dtype, tmp_path):
    model = build(CONFIGS["llama-biases"], seed=0).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "source")
    plan = case("llama-biases").plan
    out = nirvana.apply_checkpoint(tmp_path / "source", plan, tmp_path / "small")
    assert config_json(out)["dtype"] == dtype
    assert_same_bits(nirvana.load(out), nirvana.apply(model, plan))


def test_asked_type_is_written(case, tmp_path):
    source, plan = case("qwen2").source, case("qwen2").plan
    out = nirvana.apply_checkpoint(source, plan, tmp_path / "small", dtype="bfloat16")
    assert config_json(out)["dtype"] == "bfloat16"
    expected = nirvana.apply(case("qwen2").model, plan).to(torch.bfloat16)
    assert_same_bits(nirvana.load(out), expected)


def test_generation_defaults_come_along(case, tmp_path):
    model = build(CONFIGS["llama"], seed=1)
    model.generation_config.update(do_sample=True, temperature=0.7, eos_token_id=[5, 6], repetition_penalty=1.1)
    model.save_pretrained(tmp_path / "source")
    plan = case("llama").plan
    nirvana.apply_checkpoint(tmp_path / "source", plan, tmp_path / "small")
    for small in (nirvana.apply(model, plan), nirvana.load(tmp_path / "small")):
        mine = small.generation_config
        assert (mine.do_sample, mine.temperature, mine.eos_token_id) == (True, 0.7, [5, 6])
        assert mine.repetition_penalty == 1.1
        assert mine is not model.generation_config


#: Published checkpoints hold tensors that the classes of today do not make: copies of the embedding, old buffers.
EXTRA = {
    "t5": {
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
        "lm_head.weight": "shared.weight",
        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": None,
    },
    "llama-tied": {
        "lm_head.weight": "model.embed_tokens.weight",
        "model.layers.0.self_attn.rotary_emb.inv_freq": None,
    },
}


@pytest.mark.parametrize("name", EXTRA)
def test_tensors_of_older_checkpoints_do_no_harm(case, name, tmp_path):
    case(name).model.save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    extra = {key: tensors[of].clone() if of else torch.rand(5) for key, of in EXTRA[name].items()}
    safetensors.torch.save_file(tensors | extra, file, metadata={"format": "pt"})
    out = nirvana.apply_checkpoint(tmp_path / "source", case(name).plan, tmp_path / "small")
    assert_same_bits(nirvana.load(out), case(name).small)


@pytest.mark.parametrize("missing", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_missing_tensor_is_named(case, missing, tmp_path):
    """A tensor that no plan cuts counts as well: transformers would invent a norm of ones, at the next load."""
    case("llama").model.save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    del tensors[missing]
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(NirvanaError, match=re.escape(missing)):
        nirvana.apply_checkpoint(tmp_path / "source", case("llama").plan, tmp_path / "small")
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("name", ["qwen2-tied", "t5"])
def test_more_than_ten_layers_stay_in_order(name, tmp_path):
    """Layer numbers are text in config.json, where "10" stands before "2"."""
    config = copy.deepcopy(CONFIGS[name])
    if config.is_encoder_decoder:
        config.num_layers = config.num_decoder_layers = 12
    else:
        config.num_hidden_layers = 12
        config.layer_types = ["full_attention"] * 12
    model = build(config, seed=4)
    model.save_pretrained(tmp_path / "source")
    plan = random_plan(model, seed=4)
    out = nirvana.apply_checkpoint(tmp_path / "source", plan, tmp_path / "small")
    assert_same_bits(nirvana.load(out), nirvana.apply(model, plan))


def test_pruned_checkpoint_is_pruned_again_from_file(case, tmp_path):
    for name in ("llama-biases", "t5"):
        plan = random_plan(case(name).small, seed=1)
        out = nirvana.apply_checkpoint(case(name).folder, plan, tmp_path / name)
        assert_same_bits(nirvana.load(out), nirvana.apply(case(name).small, plan))


def test_source_is_not_overwritten(case, tmp_path):
    case("qwen3").model.save_pretrained(tmp_path / "model")
    with pytest.raises(NirvanaError, match="to be pruned"):
        nirvana.apply_checkpoint(tmp_path / "model", case("qwen3").plan, tmp_path / "model", overwrite=True)
    assert_same_bits(nirvana.load(tmp_path / "model"), case("qwen3").model)


# Generation


def generate(model: PreTrainedModel, arguments: dict[str, Tensor], **options) -> tuple[Tensor, Tensor | None]:
    """Twelve new tokens a row, never the same pair twice, and the raw logits of each step."""
    prompt = {key: value for key, value in arguments.items() if key != "decoder_input_ids"}
    output = model.generate(
        **prompt,
        **{"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0, **options},
        no_repeat_ngram_size=2,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return output.sequences, torch.stack(output.logits)


def assert_same_generation(actual: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(actual[0], expected[0])
    torch.testing.assert_close(actual[1], expected[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", GENERATING)
def test_greedy_generation_with_cache_equals_without(case, name):
    """A batch of two with left padding; the dense model with masked units is the third witness."""
    model = nirvana.load(case(name).folder)
    cached = generate(model, case(name).arguments, use_cache=True)
    assert_same_generation(generate(model, case(name).arguments, use_cache=False), cached)
    with nirvana.masked(case(name).model, case(name).plan) as masked:
        assert_same_generation(generate(masked, case(name).arguments), cached)


@pytest.mark.parametrize("name", GENERATING)
def test_beam_search_with_cache_equals_without(case, name):
    model = case(name).small
    cached = generate(model, case(name).arguments, num_beams=3, use_cache=True)
    assert_same_generation(generate(model, case(name).arguments, num_beams=3, use_cache=False), cached)
    with nirvana.masked(case(name).model, case(name).plan) as masked:
        assert_same_generation(generate(masked, case(name).arguments, num_beams=3), cached)


@pytest.mark.parametrize("name", GENERATING)
def test_static_cache_equals_the_growing_one(case, name):
    model = case(name).small
    growing = generate(model, case(name).arguments)
    assert_same_generation(generate(model, case(name).arguments, cache_implementation="static"), growing)


@pytest.mark.parametrize("name", GENERATING)
def test_padding_does_not_change_what_a_row_generates(case, name):
    model, arguments = case(name).small, case(name).arguments
    together = generate(model, arguments)[0]
    real = int(arguments["attention_mask"][1].sum())
    alone = generate(model, {key: arguments[key][1:, -real:] for key in ("input_ids", "attention_mask")})[0]
    assert torch.equal(together[1, -12:], alone[0, -12:])


@pytest.mark.parametrize("name", ALL)
def test_eager_attention_equals_sdpa_in_every_layer(case, name):
    model = nirvana.load(case(name).folder)
    arguments = case(name).arguments
    assert model.config._attn_implementation == "sdpa"
    sdpa = logits(model, arguments)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(logits(model, arguments), sdpa, rtol=0, atol=1e-5)
    # Only eager attention can hand out its weights: one layer left behind would show here. Where the stock T5 itself
    # is not reached (transformers 5.17), its subclass is not either.
    dense = nirvana.load(case(name).source)
    dense.set_attn_implementation("eager")
    reached = attention_heads(dense, arguments) != []
    assert reached or model.config.is_encoder_decoder
    assert attention_heads(model, arguments) == (kept_query_heads(case(name)) if reached else [])


def attention_heads(model: PreTrainedModel, arguments: dict[str, Tensor]) -> list[int]:
    """Sorted head counts of the attention weights that the model hands out."""
    with torch.no_grad():
        output = model(**arguments, output_attentions=True, use_cache=False)
    fields = ("encoder_attentions", "decoder_attentions", "cross_attentions", "attentions")
    return sorted(layer.shape[1] for field in fields for layer in output.get(field) or ())


def kept_query_heads(case: Case) -> list[int]:
    """Sorted head counts that the plan leaves."""
    config = case.model.config
    ratio = 1 if config.is_encoder_decoder else config.num_attention_heads // config.num_key_value_heads
    blocks = nirvana.describe(config).blocks
    return sorted(len(case.plan.kept[block.name]) * ratio for block in blocks if block.is_attention)


# Equal widths: stock checkpoints


@dataclass(frozen=True)
class Uniform:
    """A plan with equal counts in every layer and the model type that must hold its result."""

    config: str
    groups: int
    neurons: int
    model_type: str


UNIFORM = {
    "llama": Uniform("llama", 2, 19, "llama"),
    "llama-with-biases": Uniform("llama-biases", 2, 23, "llama"),
    "llama-tied": Uniform("llama-tied", 2, 41, "llama"),
    "llama-head-dim": Uniform("llama-head-dim", 2, 16, "llama"),
    # 9 heads do not divide a hidden size of 48, nor 12 one of 64: LlamaConfig refuses them.
    "llama-as-mistral": Uniform("llama", 3, 11, "mistral"),
    "llama-tied-as-mistral": Uniform("llama-tied", 3, 40, "mistral"),
    "mistral": Uniform("mistral", 2, 17, "mistral"),
    "qwen2": Uniform("qwen2", 3, 29, "qwen2"),
    # Two of three heads: hidden_size / heads is no longer head_dim, which a qwen2 configuration cannot tell vLLM.
    "qwen2-tied-as-seed-oss": Uniform("qwen2-tied", 2, 13, "seed_oss"),
    "qwen2-tied-all-heads": Uniform("qwen2-tied", 3, 13, "qwen2"),
    "qwen3": Uniform("qwen3", 3, 31, "qwen3"),
    "qwen3-tied": Uniform("qwen3-tied", 2, 8, "qwen3"),
    "t5": Uniform("t5", 3, 7, "t5"),
    "t5-gated": Uniform("t5-gated", 4, 21, "t5"),
    "t5-deep-decoder": Uniform("t5-deep-decoder", 3, 10, "t5"),
}

#: Opens each folder without nirvana and writes what it computes; the last folder needs nirvana and must be refused.
STOCK_PROCESS = """
import importlib.util, json, sys
sys.modules["nirvana"] = None  # an installed copy must not help
assert importlib.util.find_spec("nirvana") is None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
torch.set_num_threads(1)
folders, unequal = json.load(sys.stdin)
for folder in folders:
    config = AutoConfig.from_pretrained(folder)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model, report = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), (folder, report)
    with torch.no_grad():
        output = model.eval()(**load_file(folder + "/inputs.safetensors"), use_cache=False)
    save_file({"logits": output.logits}, folder + "/logits.safetensors")
assert not any(name.startswith("nirvana.") for name in sys.modules)
try:
    AutoConfig.from_pretrained(unequal, trust_remote_code=False)
except ValueError as error:
    print(error)
else:
    raise AssertionError("a pruned_llama checkpoint opened without nirvana and without trust")
"""


@pytest.fixture(scope="module")
def stock(case, tmp_path_factory) -> dict[str, tuple[Path, PreTrainedModel]]:
    """Every uniform checkpoint with its model in memory, after a process without nirvana computed its logits."""
    parent = tmp_path_factory.mktemp("stock")
    made = {}
    for name, uniform in UNIFORM.items():
        dense = case(uniform.config)
        plan = uniform_plan(dense.model, uniform.groups, uniform.neurons, seed=0)
        folder = nirvana.apply_checkpoint(dense.source, plan, parent / name)
        safetensors.torch.save_file(dense.arguments, folder / "inputs.safetensors")
        made[name] = folder, nirvana.apply(dense.model, plan)
    process = subprocess.run(
        [sys.executable, "-I", "-c", STOCK_PROCESS],
        input=json.dumps([[str(folder) for folder, _ in made.values()], str(case("llama").folder)]),
        cwd=tmp_path_factory.mktemp("elsewhere"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert "trust_remote_code=True" in process.stdout
    return made


@pytest.mark.parametrize("name", UNIFORM)
def test_equal_widths_open_without_nirvana(case, stock, name):
    folder, small = stock[name]
    config = config_json(folder)
    assert config["model_type"] == UNIFORM[name].model_type == small.config.model_type
    assert config["architectures"] == [type(small).__name__]
    assert not [key for key in config if "per_layer" in key or key == "auto_map"]
    assert_same_bits(nirvana.load(folder), small)
    arguments = case(UNIFORM[name].config).arguments
    with torch.no_grad():
        expected = small(**arguments, use_cache=False).logits
    computed = safetensors.torch.load_file(folder / "logits.safetensors")["logits"]
    torch.testing.assert_close(computed, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["llama-as-mistral", "llama-tied-as-mistral", "qwen2-tied-as-seed-oss"])
def test_another_type_has_no_window_and_the_same_logits(case, stock, name):
    uniform = UNIFORM[name]
    dense = case(uniform.config)
    folder, small = stock[name]
    assert config_json(folder).get("sliding_window") is None
    assert config_json(folder)["head_dim"] == 8 if uniform.model_type == "seed_oss" else True
    plan = uniform_plan(dense.model, uniform.groups, uniform.neurons, seed=0)
    arguments = inputs(dense.model, seed=5, length=100)
    with nirvana.masked(dense.model, plan) as masked:
        expected = logits(masked, arguments)
    torch.testing.assert_close(logits(small, arguments), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, True)], ids=["both", "attention", "mlp"])
def test_biases_keep_indivisible_heads_out_of_stock_classes(biases, tmp_path):
    """Three heads do not divide a hidden size of 32, and Mistral has no biases."""
    config = copy.deepcopy(CONFIGS["llama-biases"])
    config.attention_bias, config.mlp_bias = biases
    dense = build(config, seed=3)
    dense.save_pretrained(tmp_path / "source")
    plan = uniform_plan(dense, groups=3, neurons=9, seed=3)
    nirvana.apply_checkpoint(tmp_path / "source", plan, tmp_path / "small")
    small = nirvana.load(tmp_path / "small")
    assert small.config.model_type == "pruned_llama"
    assert_same_bits(small, nirvana.apply(dense, plan))
    arguments = inputs(dense, seed=3)
    with nirvana.masked(dense, plan) as masked:
        expected = logits(masked, arguments)
    torch.testing.assert_close(logits(small, arguments), expected, rtol=0, atol=1e-5)


def test_t5_with_equal_counts_but_other_heads_is_not_stock(case):
    """One position bias serves all layers of a stock stack, so its layers must keep the same heads."""
    dense = case("t5")
    plan = uniform_plan(dense.model, groups=3, neurons=9, seed=0)
    kept = {block.name: list(block.kept) for block in plan.blocks}
    name = "encoder.block.1.layer.0.SelfAttention"
    kept[name] = [unit for unit in range(5) if unit not in kept[name]] + kept[name][:1]
    blocks = [{**block.__dict__, "kept": sorted(kept[block.name])} for block in plan.blocks]
    edited = PruningPlan.from_dict({**plan.__dict__, "format": "nirvana-plan", "version": 1, "blocks": blocks})
    small = nirvana.apply(dense.model, edited)
    assert small.config.model_type == "pruned_t5"
    with nirvana.masked(dense.model, edited) as masked:
        expected = logits(masked, dense.arguments)
    torch.testing.assert_close(logits(small, dense.arguments), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scope", ["both", "attention", "mlp"])
@pytest.mark.parametrize("name", ["llama-tied", "mistral", "qwen2", "qwen3", "t5", "t5-gated"])
def test_uniform_allocation_makes_a_stock_model(case, name, scope):
    dense = case(name).model
    generator = torch.Generator().manual_seed(0)
    scores = {b.name: torch.rand(b.size, generator=generator) for b in nirvana.describe(dense).blocks}
    plan = nirvana.allocate(scores, dense, sparsity=0.2, allocation="uniform", align=1, scope=scope)
    assert plan.sparsity > 0.1
    small = nirvana.apply(dense, plan)
    assert small.config.model_type in {dense.config.model_type, "mistral"}  # its Qwen2 has sliding windows
    with nirvana.masked(dense, plan) as masked:
        expected = logits(masked, case(name).arguments)
    torch.testing.assert_close(logits(small, case(name).arguments), expected, rtol=0, atol=1e-5)


# Training


@pytest.mark.parametrize("name", ["llama-biases", "qwen3", "t5-gated"])
def test_trained_model_is_saved_and_loaded(case, name, tmp_path):
    model = nirvana.load(case(name).folder).train()
    train_one_step(model, case(name).arguments)
    model.eval().save_pretrained(tmp_path)
    loaded = nirvana.load(tmp_path)
    assert_same_bits(loaded, model)
    assert not torch.equal(logits(loaded, case(name).arguments), logits(case(name).small, case(name).arguments))


def train_one_step(model: torch.nn.Module, arguments: dict[str, Tensor]) -> None:
    labels = arguments.get("decoder_input_ids", arguments["input_ids"])
    arguments = {key: value for key, value in arguments.items() if key != "decoder_input_ids"}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(**arguments, labels=labels).loss.backward()
    optimizer.step()


@pytest.mark.parametrize(("name", "targets"), [("llama", ["q_proj", "v_proj", "down_proj"]), ("t5", ["q", "v", "wo"])])
def test_lora_is_trained_merged_and_saved(case, name, targets, tmp_path):
    arguments = case(name).arguments
    torch.manual_seed(0)
    adapted = peft.get_peft_model(
        nirvana.load(case(name).folder), peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets)
    )
    train_one_step(adapted.train(), arguments)
    expected = logits(adapted.eval(), arguments)
    assert (expected - logits(case(name).small, arguments)).abs().max() > 1e-2
    with pytest.raises(NirvanaError, match="merge adapters"):
        nirvana.apply(adapted, case(name).plan)

    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(nirvana.load(case(name).folder), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(again, arguments), expected, rtol=0, atol=1e-6)

    merged = adapted.merge_and_unload()
    assert type(merged) is type(case(name).small)
    torch.testing.assert_close(logits(merged, arguments), expected, rtol=0, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    assert_same_bits(nirvana.load(tmp_path / "merged"), merged)


# The safetensors files, byte by byte


TENSORS = {
    "b.weight": torch.tensor([[1.0, -2.0], [0.5, 0.0]]),
    "a": torch.tensor([1.0, 2.0, -3.0], dtype=torch.bfloat16),
    "none": torch.empty(0, 5, dtype=torch.float16),
    "half": torch.tensor([1.0], dtype=torch.float16),
    "one": torch.tensor(258),
}

FILE = (
    b'H\x01\x00\x00\x00\x00\x00\x00{"__metadata__":{"format":"pt"},'
    b'"b.weight":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},'
    b'"a":{"dtype":"BF16","shape":[3],"data_offsets":[16,22]},'
    b'"none":{"dtype":"F16","shape":[0,5],"data_offsets":[22,22]},'
    b'"half":{"dtype":"F16","shape":[1],"data_offsets":[22,24]},'
    b'"one":{"dtype":"I64","shape":[],"data_offsets":[24,32]}}   '
    b"\x00\x00\x80\x3f\x00\x00\x00\xc0\x00\x00\x00\x3f\x00\x00\x00\x00"
    b"\x80\x3f\x00\x40\x40\xc0"
    b"\x00\x3c"
    b"\x02\x01\x00\x00\x00\x00\x00\x00"
)


def infos(tensors: dict[str, Tensor]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def assert_equal_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape), name
        assert torch.equal(tensor, expected[name]), name


def test_writer_is_byte_exact(tmp_path):
    write_weights(tmp_path, infos(TENSORS), TENSORS.__getitem__)
    assert (tmp_path / "model.safetensors").read_bytes() == FILE
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    assert_equal_tensors(safetensors.torch.load_file(tmp_path / "model.safetensors"), TENSORS)


def test_header_is_padded_to_eight_bytes():
    for length in range(1, 20):
        data = header({"n" * length: TensorInfo((1,), torch.float32)})
        assert len(data) % 8 == 0
        assert int.from_bytes(data[:8], "little") == len(data) - 8
        assert json.loads(data[8:])["n" * length]["data_offsets"] == [0, 4]


@pytest.mark.parametrize(
    "dtype",
    ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"],
)
def test_one_tensor_gives_the_bytes_of_safetensors(dtype, tmp_path):
    tensor = (torch.rand(5, 3, generator=torch.Generator().manual_seed(0)) * 9).to(getattr(torch, dtype))
    write_weights(tmp_path, infos({"weight": tensor}), lambda name: tensor)
    expected = safetensors.torch.save({"weight": tensor}, metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == expected


def test_strided_tensor_is_written_in_row_order(tmp_path):
    tensor = torch.arange(12.0).view(3, 4)
    write_weights(tmp_path, {"w": TensorInfo((4, 3), torch.float32)}, lambda name: tensor.t())
    assert torch.equal(safetensors.torch.load_file(tmp_path / "model.safetensors")["w"], tensor.t())


def test_shards_are_numbered_and_indexed(tmp_path):
    tensors = {f"t{i}": torch.full((4,), float(i)) for i in range(5)}
    reported = []
    write_weights(tmp_path, infos(tensors), tensors.__getitem__, shard_size=32, progress=reported.append)
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text()) == {
        "metadata": {"total_size": 80},
        "weight_map": {f"t{i}": f"model-0000{1 + i // 2}-of-00003.safetensors" for i in range(5)},
    }
    read: dict[str, Tensor] = {}
    for file in tmp_path.glob("*.safetensors"):
        read |= safetensors.torch.load_file(file)
    assert_equal_tensors(dict(sorted(read.items())), tensors)
    assert reported == [16] * 5


@pytest.mark.parametrize("tensor", [torch.zeros(3), torch.zeros(2, dtype=torch.float16)], ids=["shape", "type"])
def test_tensor_other_than_announced_is_refused(tensor, tmp_path):
    with pytest.raises(ValueError, match="announced"):
        write_weights(tmp_path, {"w": TensorInfo((2,), torch.float32)}, lambda name: tensor)


# Whole or not at all


class Stop(BaseException):
    """Like Ctrl-C: nothing catches it by accident."""


def test_directory_appears_when_the_body_ends(tmp_path):
    with atomic_directory(tmp_path / "out") as folder:
        (folder / "file").write_text("content")
        assert not (tmp_path / "out").exists()
        assert folder.parent == tmp_path
    assert (tmp_path / "out" / "file").read_text() == "content"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


def fail_to_write(target: Path, failure: type[BaseException], overwrite: bool = False) -> None:
    """Half a checkpoint, then `failure`."""
    with atomic_directory(target, overwrite) as folder:
        (folder / "config.json").write_text("half")
        raise failure


@pytest.mark.parametrize("place", ["out", "new/folders/out"])
@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, Stop])
def test_failing_body_leaves_nothing(failure, place, tmp_path):
    with pytest.raises(failure):
        fail_to_write(tmp_path / place, failure)
    assert list(tmp_path.iterdir()) == []


def test_refusing_disk_is_a_clear_error_and_leaves_nothing(tmp_path):
    with (
        pytest.raises(NirvanaError, match=r"cannot write .*out: No space left on device; nothing was written"),
        atomic_directory(tmp_path / "out"),
    ):
        # What the kernel says of every write to it.
        Path("/dev/full").write_text("content")
    assert list(tmp_path.iterdir()) == []


def test_overwriting_keeps_the_old_folder_until_the_new_one_is_whole(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    for file in ("config.json", "model.safetensors", "stale"):
        (target / file).write_text("old")
    with pytest.raises(Stop):
        fail_to_write(target, Stop, overwrite=True)
    assert (target / "config.json").read_text() == "old"
    with atomic_directory(target, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
        assert (target / "config.json").read_text() == "old"
    assert {file.name: file.read_text() for file in target.iterdir()} == {"config.json": "new"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_existing_folder_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(NirvanaError, match="--overwrite"), atomic_directory(tmp_path / "out"):
        pytest.fail("the body ran")


def _file(path: Path) -> None:
    path.write_text("precious")


def _other_folder(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("precious")


def _application(path: Path) -> None:
    _other_folder(path)
    (path / "config.json").write_text("{}")


def _checkpoint(path: Path) -> None:
    path.mkdir()
    for file in ("config.json", "model.safetensors"):
        (path / file).write_text("precious")


def _folder_of_checkpoints(path: Path) -> None:
    _checkpoint(path)
    _checkpoint(path / "step-100")


def _link_to_checkpoint(path: Path) -> None:
    _checkpoint(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


@pytest.mark.parametrize("make", [_file, _other_folder, _application, _folder_of_checkpoints, _link_to_checkpoint])
def test_overwrite_never_deletes_what_is_no_checkpoint(make, tmp_path):
    make(tmp_path / "out")
    before = sorted(tmp_path.rglob("*"))
    with (
        pytest.raises(NirvanaError, match="other than a checkpoint"),
        atomic_directory(tmp_path / "out", overwrite=True),
    ):
        pytest.fail("the body ran")
    assert sorted(tmp_path.rglob("*")) == before


def test_empty_folder_may_be_overwritten(tmp_path):
    (tmp_path / "out").mkdir()
    with atomic_directory(tmp_path / "out", overwrite=True) as folder:
        (folder / "file").write_text("new")
    assert (tmp_path / "out" / "file").read_text() == "new"


def write_beside_another(target: Path) -> None:
    """A checkpoint, while another process makes one in the same place."""
    with atomic_directory(target) as folder:
        (folder / "config.json").write_text("mine")
        target.mkdir()
        (target / "config.json").write_text("theirs")


def test_folder_that_appears_meanwhile_is_not_deleted(tmp_path):
    with pytest.raises(NirvanaError):
        write_beside_another(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_text() == "theirs"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_file_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(NirvanaError, match="not a writable folder"):
        write_file(tmp_path / "file" / "plan.json", b"{}")
    with pytest.raises(NirvanaError, match="not a writable folder"), atomic_directory(tmp_path / "file" / "out"):
        pytest.fail("the body ran")


def test_file_is_written_whole(tmp_path):
    path = tmp_path / "new" / "plan.json"
    write_file(path, b"first")
    assert path.read_bytes() == b"first"
    with pytest.raises(NirvanaError, match="--overwrite"):
        write_file(path, b"second")
    assert path.read_bytes() == b"first"
    write_file(path, b"second", overwrite=True)
    assert path.read_bytes() == b"second"
    assert [file.name for file in path.parent.iterdir()] == ["plan.json"]
    (path.parent / "plain").write_bytes(b"")
    assert path.stat().st_mode == (path.parent / "plain").stat().st_mode


def test_file_does_not_replace_a_folder(tmp_path):
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(NirvanaError, match="is a folder"):
        write_file(tmp_path / "plan.json", b"{}", overwrite=True)
    assert (tmp_path / "plan.json").is_dir()


class Interrupted(Progress):
    """Ctrl-C after some bytes of the weights are written."""

    @contextlib.contextmanager
    def stage(self, name, total, unit=""):
        written = 0

        def advance(count: int) -> None:
            nonlocal written
            written += count
            if written > total // 2:
                raise KeyboardInterrupt

        yield advance


@pytest.mark.parametrize("overwrite", [False, True])
def test_interrupted_checkpoint_leaves_what_was_there(case, tmp_path, overwrite):
    if overwrite:
        nirvana.apply_checkpoint(case("llama").source, case("llama").plan, tmp_path / "out")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(KeyboardInterrupt):
        nirvana.apply_checkpoint(
            case("llama").source, case("llama").plan, tmp_path / "out", overwrite=overwrite, progress=Interrupted()
        )
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == (["out"] if overwrite else [])


def test_existing_checkpoint_is_refused_and_then_replaced(case, tmp_path):
    first, second = case("llama"), case("qwen3")
    nirvana.apply_checkpoint(first.source, first.plan, tmp_path / "out")
    with pytest.raises(NirvanaError, match="--overwrite"):
        nirvana.apply_checkpoint(second.source, second.plan, tmp_path / "out")
    assert_same_bits(nirvana.load(tmp_path / "out"), first.small)
    nirvana.apply_checkpoint(second.source, second.plan, tmp_path / "out", overwrite=True)
    assert_same_bits(nirvana.load(tmp_path / "out"), second.small)
