"""gamma for each kind of attention of an encoder-decoder: rates and counts worked out by hand."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig, T5Config

from nirvana import NirvanaError, PruningPlan, allocate, describe
from nirvana.rates import split_by_kind, split_sparsity

pytestmark = pytest.mark.usefixtures("one_thread")

#: Each kind of attention has 2 x 10 heads of 4 x 2 x 8 = 64 parameters, 1280 in all; the MLPs have 4 x 100 neurons of
#: 2 x 8 = 16, 6400 in all; together 10 240.
CONFIG = T5Config(
    vocab_size=11,
    d_model=8,
    d_kv=2,
    num_heads=10,
    d_ff=100,
    num_layers=2,
    num_decoder_layers=2,
    decoder_start_token_id=0,
)
GAMMA = {"encoder": 2.0, "decoder": 4.0, "cross": 1.0}


def scores(seed=0):
    """Decoder heads score far above encoder heads, and cross-attention heads between them."""
    generator = torch.Generator().manual_seed(seed)
    factor = {"encoder": 1.0, "cross": 10.0, "decoder": 100.0, "": 1.0}
    blocks = describe(CONFIG).blocks
    return {b.name: (1 + torch.rand(b.size, generator=generator)) * factor[b.attention_kind] for b in blocks}


def names(kind):
    if kind == "mlp":
        return [b.name for b in describe(CONFIG).blocks if not b.is_attention]
    if kind == "cross":
        return [f"decoder.block.{i}.layer.1.EncDecAttention" for i in range(2)]
    return [f"{kind}.block.{i}.layer.0.SelfAttention" for i in range(2)]


def gone(plan, kind):
    """(block, unit) of what goes."""
    sizes = {block.name: block.size for block in plan.blocks}
    return {(name, unit) for name in names(kind) for unit in set(range(sizes[name])) - set(plan.kept[name])}


def lowest(table, kind, count):
    units = [(float(score), name, unit) for name in names(kind) for unit, score in enumerate(table[name])]
    return {(name, unit) for _, name, unit in sorted(units)[:count]}


def test_each_kind_gives_at_its_own_rate_and_is_ranked_by_itself():
    """p = 0.4: 4096 go; rate_mlp = 4096 / (6400 + 1280 (1/2 + 1/4 + 1)) = 0.474; heads 4.7, 2.4 and 9.5 of 20."""
    table = scores()
    plan = allocate(table, CONFIG, sparsity=0.4, gamma=GAMMA, align=1)
    for kind, count in (("encoder", 4), ("decoder", 2), ("cross", 9)):
        assert gone(plan, kind) == lowest(table, kind, count), kind
    # The MLPs pay the rest: (4096 - 15 x 64) / 16 neurons.
    assert gone(plan, "mlp") == lowest(table, "mlp", 196)
    up = allocate(table, CONFIG, sparsity=0.4, gamma=GAMMA, align=1, rounding="up")
    assert [len(gone(up, kind)) for kind in GAMMA] == [4, 2, 9]
    assert gone(up, "mlp") == lowest(table, "mlp", 189)  # 0.474 x 400 = 189.6


def test_a_rate_above_one_is_clamped():
    """cross at 0.1: 4096 / (6400 + 1280 x 10.75) x 10 is above 1, so it gives 1280 and the others 2816 / 7360."""
    rates = split_by_kind({**dict.fromkeys(GAMMA, 1280), "mlp": 6400}, {**GAMMA, "cross": 0.1}, 4096)
    rate = 2816 / 7360
    assert rates == pytest.approx({"encoder": rate / 2, "decoder": rate / 4, "cross": 1, "mlp": rate}, rel=1e-12)
    plan = allocate(scores(), CONFIG, sparsity=0.4, gamma={**GAMMA, "cross": 0.1}, align=1)
    assert [len(gone(plan, kind)) for kind in GAMMA] == [3, 1, 18]  # of 3.8, 1.9 and 20: every block keeps a head
    assert plan.sparsity == pytest.approx(0.4, abs=1e-3)


def test_scope_attention_divides_among_the_kinds_alone():
    """p = 0.15: 1536 / (1280 x 1.75) = 0.686: 6.9, 3.4 and 13.7 heads, of 24."""
    plan = allocate(scores(), CONFIG, sparsity=0.15, gamma=GAMMA, scope="attention")
    counts = [len(gone(plan, kind)) for kind in GAMMA]
    assert counts == [7, 3, 14]
    assert not gone(plan, "mlp")
    with pytest.raises(NirvanaError, match=r"exceeds the attention share of 37\.5%"):
        allocate(scores(), CONFIG, sparsity=0.4, gamma=GAMMA, scope="attention")


def test_scope_mlp_leaves_all_heads():
    plan = allocate(scores(), CONFIG, sparsity=0.4, gamma=GAMMA, scope="mlp", align=1)
    assert not any(gone(plan, kind) for kind in GAMMA)
    assert len(gone(plan, "mlp")) == 256


def test_heads_of_every_block_are_divisible_among_devices():
    plan = allocate(scores(), CONFIG, sparsity=0.4, gamma=GAMMA, tensor_parallel=5)
    assert all(len(kept) % 5 == 0 for kept in plan.kept.values())
    assert plan.sparsity == pytest.approx(0.4, abs=0.01)


def test_attention_gives_more_where_the_mlps_cannot():
    """With 8 neurons left in each block, 368 x 16 = 5888 of 9216 can come from the MLPs: 52 heads must go."""
    plan = allocate(scores(), CONFIG, sparsity=0.9, gamma={"encoder": 40.0, "decoder": 50.0, "cross": 60.0})
    assert [len(plan.kept[name]) for name in names("mlp")] == [8] * 4
    assert sum(len(gone(plan, kind)) for kind in GAMMA) == 52


@pytest.mark.parametrize("gamma", [0.3, 1.0, 3.36, 50.0])
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_equal_gammas_are_one_gamma(gamma, sparsity):
    sizes = {"encoder": 1280, "decoder": 900, "cross": 700, "mlp": 6400}
    rates = split_by_kind(sizes, dict.fromkeys(GAMMA, gamma), sparsity * sum(sizes.values()))
    one = split_sparsity(1280 + 900 + 700, 6400, sparsity, gamma)
    assert rates == pytest.approx({**dict.fromkeys(GAMMA, one.attention), "mlp": one.mlp}, rel=1e-12)


def test_the_plan_stores_it():
    plan = allocate(scores(), CONFIG, sparsity=0.4, gamma={"cross": 1.0, "decoder": 4.0, "encoder": 2.0})
    assert PruningPlan.from_dict(json.loads(plan.to_json())).settings["gamma"] == GAMMA
    assert list(plan.settings["gamma"]) == ["encoder", "decoder", "cross"]


def test_a_model_that_was_pruned_before_has_the_same_kinds():
    plan = allocate(scores(), CONFIG, sparsity=0.4, gamma=GAMMA)
    pruned = describe(CONFIG).pruned_config(plan.kept)
    assert pruned.model_type != "t5"
    kinds = {block.name: block.attention_kind for block in describe(CONFIG).blocks}
    assert {block.name: block.attention_kind for block in describe(pruned).blocks} == kinds


@pytest.mark.parametrize(
    ("gamma", "options", "message"),
    [
        ({**GAMMA, "cross": 0.0}, {}, "--gamma cross=0.0 must be a positive number"),
        ({**GAMMA, "encoder": -1.0}, {}, "--gamma encoder=-1.0 must be"),
        ({**GAMMA, "decoder": float("nan")}, {}, "--gamma decoder=nan must be"),
        ({**GAMMA, "mlp": 1.0}, {}, "--gamma mlp=... is not a kind of attention; known are encoder, decoder, cross"),
        ({"encoder": 1.0, "decoder": 1.0}, {}, "--gamma has no value for cross"),
        ({}, {}, "--gamma has no value for encoder"),
        (GAMMA, {"allocation": "uniform"}, "not with --allocation uniform"),
    ],
)
def test_what_makes_no_sense_is_refused(gamma, options, message):
    with pytest.raises(NirvanaError, match=message):
        allocate(scores(), CONFIG, sparsity=0.4, gamma=gamma, **options)


def test_a_decoder_has_one_kind():
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=1)
    table = {block.name: torch.ones(block.size) for block in describe(config).blocks}
    with pytest.raises(NirvanaError, match="has no encoder attention; give one number"):
        allocate(table, config, sparsity=0.4, gamma=GAMMA)


def test_the_command_line(cli_here, t5_folder, tmp_path):
    scored, planned = tmp_path / "s.safetensors", tmp_path / "plan.json"
    assert cli_here("score", t5_folder, "--criterion", "random", "--out", scored, "--quiet").code == 0
    options = ("--saliency", scored, "--sparsity", "0.4", "--out", planned)
    made = cli_here("plan", t5_folder, *options, "--gamma", "encoder=2, decoder=4,cross=1")
    assert made.code == 0, made.stderr
    assert PruningPlan.load(planned).settings["gamma"] == GAMMA
    wrong = {
        "encoder=2": "no value for decoder",
        "encoder=2,decoder=4,cross=x": "'cross=x' is not KIND=NUMBER",
        "encoder=2,encoder=3,decoder=4,cross=1": "encoder stands twice",
        "encoder=2,decoder=4,cross=0": "cross=0.0 must be a positive number",
        "self=2": "self=... is not a kind",
    }
    for text, message in wrong.items():
        refused = cli_here("plan", t5_folder, *options, "--gamma", text, "--overwrite")
        assert refused.code == 2
        assert message in refused.stderr
        assert refused.stderr.count("\n") == 1
