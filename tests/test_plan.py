"""The plan file: its bytes, and everything that is refused when one is read."""

from __future__ import annotations

import copy
import json
import re

import pytest
from transformers import LlamaConfig

from nirvana import NirvanaError, PruningPlan, describe
from nirvana.plan import BlockPlan, config_fingerprint

CONFIG = LlamaConfig(
    vocab_size=11,
    hidden_size=12,
    num_hidden_layers=1,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=2,
    intermediate_size=5,
)

PLAN = PruningPlan(
    architecture="llama",
    base={"name": "tiny/llämä", "config_sha256": "00ff"},
    settings={"sparsity": 0.3, "gamma": 3.36, "rounding": "budget", "align": 8, "seed": 0},
    totals={"prunable_before": 612, "prunable_after": 432, "parameters_before": 780, "parameters_after": 600},
    blocks=(
        BlockPlan("model.layers.0.self_attn", "kv_group", 3, (0, 2)),
        BlockPlan("model.layers.0.mlp", "neuron", 5, (0, 1, 3, 4)),
    ),
)

BYTES = rb"""{"format": "nirvana-plan",
 "version": 1,
 "architecture": "llama",
 "base": {"name": "tiny/ll\u00e4m\u00e4", "config_sha256": "00ff"},
 "settings": {"sparsity": 0.3, "gamma": 3.36, "rounding": "budget", "align": 8, "seed": 0},
 "totals": {"prunable_before": 612, "prunable_after": 432, "parameters_before": 780, "parameters_after": 600},
 "blocks": [
  {"name": "model.layers.0.self_attn", "unit": "kv_group", "size": 3, "kept": [0, 2]},
  {"name": "model.layers.0.mlp", "unit": "neuron", "size": 5, "kept": [0, 1, 3, 4]}]}
"""


# ---- bytes ----------------------------------------------------------------------------------------------------------


def test_the_file_is_these_bytes(tmp_path):
    PLAN.save(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_bytes() == BYTES


def test_what_is_read_back_is_the_plan(tmp_path):
    (tmp_path / "plan.json").write_bytes(BYTES)
    plan = PruningPlan.load(tmp_path / "plan.json")
    assert plan == PLAN
    assert plan.kept == {"model.layers.0.self_attn": (0, 2), "model.layers.0.mlp": (0, 1, 3, 4)}
    assert plan.sparsity == pytest.approx(180 / 612, rel=1e-15)
    plan.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == BYTES


def test_any_layout_of_the_json_is_read(tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps(json.loads(BYTES), indent=3, sort_keys=True), encoding="utf-8")
    assert PruningPlan.load(str(tmp_path / "plan.json")) == PLAN


def test_the_plan_inside_a_checkpoint_is_found(tmp_path):
    (tmp_path / "nirvana_plan.json").write_bytes(BYTES)
    assert PruningPlan.load(tmp_path) == PLAN


def test_save_makes_folders_and_leaves_nothing_else(tmp_path):
    PLAN.save(tmp_path / "a" / "b" / "plan.json")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["plan.json"]


def test_save_replaces_only_when_told_to(tmp_path):
    target = tmp_path / "plan.json"
    target.write_text("mine")
    with pytest.raises(NirvanaError, match="exists"):
        PLAN.save(target)
    assert target.read_text() == "mine"
    PLAN.save(target, overwrite=True)
    assert target.read_bytes() == BYTES
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


# ---- what is refused ------------------------------------------------------------------------------------------------


def altered(*path, value=None, drop=False):
    """The plan's JSON with one value changed or dropped."""
    data = copy.deepcopy(json.loads(BYTES))
    place = data
    for key in path[:-1]:
        place = place[key]
    if drop:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return data


MLP = r"block model\.layers\.0\.mlp"
NOT_INDICES = MLP + ": size must be a whole number and kept a list of unit indices"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (altered("blocks", 1, "kept", value=[]), MLP + ": kept is empty"),
        (altered("blocks", 1, "kept", value=[0, 2, 1]), MLP + ": kept must be sorted"),
        (altered("blocks", 1, "kept", value=[0, 1, 1]), MLP + ": kept must be sorted without doubles"),
        (altered("blocks", 1, "kept", value=[0, 5]), MLP + ": unit 5 is out of range, the block has 5"),
        (altered("blocks", 1, "kept", value=[10**30]), MLP + ": unit 10{30} is out of range"),
        (altered("blocks", 1, "kept", value=[-1, 2]), NOT_INDICES),
        (altered("blocks", 1, "kept", value=[0, True]), NOT_INDICES),
        (altered("blocks", 1, "kept", value=[False, 2]), NOT_INDICES),
        (altered("blocks", 1, "kept", value=[0.0, 1.0]), NOT_INDICES),
        (altered("blocks", 1, "kept", value=[0, 1.5]), NOT_INDICES),
        (altered("blocks", 1, "kept", value=["0"]), NOT_INDICES),
        (altered("blocks", 1, "kept", value=[None]), NOT_INDICES),
        (altered("blocks", 1, "kept", value=[[0]]), NOT_INDICES),
        (altered("blocks", 1, "kept", value="01"), NOT_INDICES),
        (altered("blocks", 1, "kept", value=3), NOT_INDICES),
        (altered("blocks", 1, "kept", value={"0": 1}), NOT_INDICES),
        (altered("blocks", 1, "kept", drop=True), NOT_INDICES),
        (altered("blocks", 1, "size", value=-5), NOT_INDICES),
        (altered("blocks", 1, "size", value=5.0), NOT_INDICES),
        (altered("blocks", 1, "size", value=True), NOT_INDICES),
        (altered("blocks", 1, "size", value="5"), NOT_INDICES),
        (altered("blocks", 1, "size", drop=True), NOT_INDICES),
        (altered("blocks", 1, "size", value=0), MLP + ": unit 4 is out of range, the block has 0"),
        (altered("blocks", 1, "unit", value="head"), MLP + ": unit must be 'kv_group' or 'neuron', not 'head'"),
        (altered("blocks", 1, "unit", drop=True), MLP + ": unit must be"),
        (altered("blocks", 1, "unit", value=["neuron"]), MLP + ": unit must be"),
        (altered("blocks", 1, "name", value="model.layers.0.self_attn"), r"self_attn stands more than once"),
        (altered("blocks", 1, "name", drop=True), "a block of the plan has no name: .*neuron"),
        (altered("blocks", 1, "name", value=7), "a block of the plan has no name"),
        (altered("blocks", 1, value=["kept"]), "a block of the plan has no name"),
        (altered("blocks", 1, value=None), "a block of the plan has no name"),
        (altered("blocks", value={}), 'the plan\'s "blocks" must be a JSON list'),
        (altered("blocks", drop=True), 'the plan\'s "blocks" must be a JSON list'),
        (altered("settings", value=[]), 'the plan\'s "settings" must be a JSON'),
        (altered("base", value="x"), 'the plan\'s "base" must be a JSON'),
        (altered("base", drop=True), 'the plan\'s "base" must be a JSON'),
        (altered("architecture", value=None), 'the plan\'s "architecture" must be a JSON'),
        (altered("totals", value=3), 'the plan\'s "totals" must be a JSON'),
        (altered("totals", "prunable_after", drop=True), 'totals must hold the whole number "prunable_after"'),
        (altered("totals", "parameters_before", value=1.5), 'totals must hold the whole number "parameters_before"'),
        (altered("totals", "parameters_after", value=True), 'totals must hold the whole number "parameters_after"'),
        (altered("totals", "prunable_before", value=-1), 'totals must hold the whole number "prunable_before"'),
        (altered("format", value="nirvana-saliency"), 'this is not a pruning plan: "format" must be "nirvana-plan"'),
        (altered("format", drop=True), "this is not a pruning plan"),
        (altered("version", value=2), "plan version 2 is not supported; this release reads 1"),
        (altered("version", value="1"), "plan version '1' is not supported"),
        (altered("version", value=None), "plan version None is not supported"),
        (altered("version", drop=True), "plan version None is not supported"),
        ([], "this is not a pruning plan"),
        ("nirvana-plan", "this is not a pruning plan"),
        (None, "this is not a pruning plan"),
    ],
)  # fmt: skip
def test_a_plan_that_contradicts_itself_is_refused(tmp_path, data, message):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(NirvanaError, match=re.escape(f"{path}: ") + ".*" + message) as caught:
        PruningPlan.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        BYTES[:-3],
        BYTES + b"}",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xfe{\x00}\x00",
        b"not a plan",
        BYTES.replace(b'"size": 5', b'"size": ' + b"9" * 5000),
        b"[" * 200_000,
    ],
    ids=["empty", "brace", "cut", "trailing", "binary", "utf-16", "text", "endless number", "endless nesting"],
)
def test_what_is_not_json_is_refused(tmp_path, content):
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(NirvanaError, match=re.escape(str(path))):
        PruningPlan.load(path)


def test_a_missing_plan_is_named(tmp_path):
    with pytest.raises(NirvanaError, match=re.escape(f"no plan at {tmp_path / 'plan.json'}")):
        PruningPlan.load(tmp_path / "plan.json")
    with pytest.raises(NirvanaError, match=r"no plan at .*nirvana_plan\.json"):
        PruningPlan.load(tmp_path)


# ---- plan and model -------------------------------------------------------------------------------------------------


def changed(**changes) -> LlamaConfig:
    return LlamaConfig(**{**CONFIG.to_dict(), **changes})


def test_a_plan_fits_the_model_it_was_made_for():
    PLAN.check_fits(describe(CONFIG))


def test_blocks_in_another_order_still_fit():
    plan = PruningPlan(PLAN.architecture, PLAN.base, PLAN.settings, PLAN.totals, PLAN.blocks[::-1])
    plan.check_fits(describe(CONFIG))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed(intermediate_size=6), MLP + ": the plan was made for 5 units of kind neuron, the model has 6"),
        (
            changed(num_key_value_heads=2),
            r"block model\.layers\.0\.self_attn: the plan was made for 3 units of kind kv_group, the model has 2",
        ),
        (changed(num_hidden_layers=2), r"says nothing about block model\.layers\.1\.self_attn"),
    ],
)
def test_a_model_of_another_shape_is_refused_by_block(config, message):
    with pytest.raises(NirvanaError, match=message):
        PLAN.check_fits(describe(config))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("blocks", 1, "name"), "model.layers.7.mlp", r"block model\.layers\.7\.mlp does not exist"),
        (("blocks", 1, "unit"), "kv_group", MLP + ": the plan was made for 5 units of kind kv_group"),
        (("architecture",), "qwen2", "the plan is for family 'qwen2', the model is 'llama'"),
    ],
)
def test_a_plan_for_another_model_is_refused(path, value, message):
    plan = PruningPlan.from_dict(altered(*path, value=value))
    with pytest.raises(NirvanaError, match=message):
        plan.check_fits(describe(CONFIG))


def test_the_fingerprint_is_of_the_model_not_of_where_it_lies(tmp_path):
    CONFIG.save_pretrained(tmp_path)
    stored = LlamaConfig.from_pretrained(tmp_path)
    stored.dtype = "bfloat16"
    stored._name_or_path = "elsewhere"
    stored.architectures = ["LlamaForCausalLM"]
    assert config_fingerprint(stored) == config_fingerprint(CONFIG)
    assert re.fullmatch("[0-9a-f]{64}", config_fingerprint(CONFIG))


@pytest.mark.parametrize("change", [{"intermediate_size": 6}, {"vocab_size": 12}, {"rms_norm_eps": 1e-3}])
def test_the_fingerprint_tells_models_apart(change):
    assert config_fingerprint(changed(**change)) != config_fingerprint(CONFIG)
