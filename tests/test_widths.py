"""Shapes that more runtimes take and their price: few widths, widths that N devices divide, Seed-OSS for Qwen2."""

from __future__ import annotations

import itertools
import json
import re

import numpy as np
import pytest
import torch
from conftest import Cli
from families import CONFIGS, build, inputs, logits, random_plan, uniform_plan
from transformers import (
    AutoConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SeedOssConfig,
    T5Config,
)

import nirvana
from nirvana import NirvanaError, PruningPlan, allocate, describe
from nirvana.checkpoint.runtimes import Shape, tensor_parallel_sizes
from nirvana.retention import kept_saliency_line

pytestmark = pytest.mark.usefixtures("one_thread")

ALIGN = 8


def llama(layers: int, groups: int, width: int, ratio: int = 2, **more) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=11,
        hidden_size=24,
        num_hidden_layers=layers,
        num_attention_heads=groups * ratio,
        num_key_value_heads=groups,
        head_dim=6,
        intermediate_size=width,
        **more,
    )


def uneven_scores(config: PreTrainedConfig, seed: int) -> dict[str, torch.Tensor]:
    """Some layers matter far more than others, and attention more than neurons."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    blocks = describe(config).blocks
    return {b.name: draw(b.size) ** 2 * (0.3 + 2 * draw(1)) * (2 if b.is_attention else 1) for b in blocks}


def pairs(plan: PruningPlan) -> list[tuple[int, int]]:
    """(KV groups, neurons) of each layer."""
    kept = [len(block.kept) for block in plan.blocks]
    return list(zip(kept[::2], kept[1::2], strict=True))


def held(scores: dict[str, torch.Tensor], plan: PruningPlan) -> float:
    """Fraction of all saliency that stays."""
    kept = sum(float(scores[name][list(units)].double().sum()) for name, units in plan.kept.items())
    return kept / sum(float(score.double().sum()) for score in scores.values())


# ---- few distinct widths --------------------------------------------------------------------------------------------

DEEP = llama(layers=12, groups=4, width=512)


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.7])
@pytest.mark.parametrize("limit", [1, 2, 4])
def test_no_more_pairs_than_asked_at_the_same_sparsity(limit, sparsity):
    scores = uneven_scores(DEEP, seed=limit)
    free = allocate(scores, DEEP, sparsity=sparsity)
    plan = allocate(scores, DEEP, sparsity=sparsity, max_widths=limit)
    assert len(set(pairs(free))) > 6
    assert len(set(pairs(plan))) <= limit
    # One pair moves in steps of 8 neurons in all layers; more pairs meet the budget as any plan does, within 0.1 %.
    step = 12 * ALIGN * describe(DEEP).blocks[1].parameters_per_unit / plan.totals["prunable_before"]
    assert abs(plan.sparsity - sparsity) <= (0.501 * step if limit == 1 else 0.001 * sparsity)
    for block in plan.blocks:
        assert block.unit == "kv_group" or len(block.kept) % ALIGN == 0
        order = scores[block.name].argsort(stable=True)
        assert set(block.kept) == set(order[block.size - len(block.kept) :].tolist())


def test_eight_pairs_hold_nearly_all_and_one_does_not():
    scores = uneven_scores(DEEP, seed=3)
    one, eight, free = (held(scores, allocate(scores, DEEP, sparsity=0.5, align=2, max_widths=n)) for n in (1, 8, None))
    assert one < 0.98 * free < 0.998 * free < eight


def test_a_limit_that_is_met_anyhow_changes_nothing():
    scores = uneven_scores(DEEP, seed=4)
    assert allocate(scores, DEEP, sparsity=0.4, max_widths=12).kept == allocate(scores, DEEP, sparsity=0.4).kept


def best_two_pairs(scores: dict[str, torch.Tensor], config: LlamaConfig, plan: PruningPlan) -> float:
    """The most that any plan holds with two pairs of widths, as many KV groups, and the budget missed by no more."""
    blocks = describe(config).blocks
    attention, mlp, layers = blocks[::2], blocks[1::2], range(config.num_hidden_layers)
    lost = [
        np.array([[float(scores[b.name].sort().values[: b.size - w].double().sum()) for w in widths] for b in kind])
        for kind, widths in (
            (attention, range(1, attention[0].size + 1)),
            (mlp, range(ALIGN, mlp[0].size + 1, ALIGN)),
        )
    ]
    mine = np.array(pairs(plan))
    cost = np.array([attention[0].parameters_per_unit, mlp[0].parameters_per_unit])
    target = plan.totals["prunable_before"] * (1 - plan.settings["sparsity"])
    tolerance = max(abs(mine.sum(0) @ cost - target), 0.001 * plan.totals["prunable_before"])
    choices = list(itertools.product(range(1, attention[0].size + 1), range(ALIGN, mlp[0].size + 1, ALIGN)))
    masks = np.array(list(itertools.product([False, True], repeat=len(layers))))[..., None]
    best = np.inf
    for one, other in itertools.combinations(choices, 2):
        widths = np.where(masks, one, other)
        sums = widths.sum(1)
        widths = widths[(sums[:, 0] == mine[:, 0].sum()) & (abs(sums @ cost - target) <= tolerance)]
        if len(widths):
            losses = lost[0][layers, widths[..., 0] - 1] + lost[1][layers, widths[..., 1] // ALIGN - 1]
            best = min(best, losses.sum(1).min())
    return 1 - best / sum(float(score.double().sum()) for score in scores.values())


@pytest.mark.parametrize(("seed", "sparsity"), [(0, 0.2), (1, 0.35), (2, 0.5), (3, 0.2), (4, 0.35), (5, 0.5)])
def test_two_pairs_hold_what_the_best_two_hold(seed, sparsity):
    """Against every pair of pairs and every way to give them to six layers."""
    config = llama(layers=6, groups=4, width=128)
    scores = uneven_scores(config, seed)
    plan = allocate(scores, config, sparsity=sparsity, gamma=1.5, max_widths=2)
    assert len(set(pairs(plan))) <= 2
    best = best_two_pairs(scores, config, plan)
    assert 0.99 * best <= held(scores, plan) <= best + 1e-9


@pytest.mark.parametrize("scope", ["mlp", "attention"])
def test_a_kind_that_is_not_pruned_stays_whole(scope):
    scores = uneven_scores(DEEP, seed=5)
    sparsity = 0.3 if scope == "mlp" else 0.05
    plan = allocate(scores, DEEP, sparsity=sparsity, scope=scope, max_widths=3)
    assert len(set(pairs(plan))) <= 3
    groups, neurons = map(set, zip(*pairs(plan), strict=True))
    assert (groups == {4}, neurons == {512}) == (scope == "mlp", scope == "attention")
    assert plan.sparsity == pytest.approx(sparsity, abs=0.003)


def test_rounding_up_removes_what_it_removes_without_the_limit():
    scores = uneven_scores(DEEP, seed=6)
    free = allocate(scores, DEEP, sparsity=0.4, rounding="up", align=128)
    plan = allocate(scores, DEEP, sparsity=0.4, rounding="up", align=128, max_widths=4)
    assert len(set(pairs(plan))) <= 4
    assert free.sparsity < 0.39
    assert plan.sparsity == pytest.approx(free.sparsity, abs=0.005)


def test_one_pair_is_a_stock_checkpoint():
    plan = allocate(uneven_scores(DEEP, seed=7), DEEP, sparsity=0.4, max_widths=1)
    assert not describe(DEEP).pruned_config(plan.kept).model_type.startswith("pruned_")


def test_a_pruned_model_is_quantised_within_what_it_has():
    """Its layers differ already: none may get more than it has."""
    first = allocate(uneven_scores(DEEP, seed=8), DEEP, sparsity=0.3)
    config = describe(DEEP).pruned_config(first.kept)
    plan = allocate(uneven_scores(config, seed=9), config, sparsity=0.4, max_widths=3)
    assert len(set(pairs(plan))) <= 3
    assert plan.sparsity == pytest.approx(0.4, abs=0.004)
    with pytest.raises(NirvanaError, match="--max-widths 1 is impossible: the layers differ"):
        allocate(uneven_scores(config, seed=9), config, sparsity=0.2, scope="mlp", max_widths=1)
    with pytest.raises(NirvanaError, match="--allocation global"):
        allocate(uneven_scores(config, seed=9), config, sparsity=0.05, allocation="uniform", max_widths=1)


# ---- widths that N devices divide -----------------------------------------------------------------------------------

T5 = T5Config(vocab_size=11, d_model=16, d_kv=4, num_heads=4, d_ff=64, num_layers=2, num_decoder_layers=3)
FAMILIES = {
    "llama": llama(layers=4, groups=8, width=260, ratio=1),
    "mistral": MistralConfig(vocab_size=11, hidden_size=24, num_hidden_layers=4, num_attention_heads=12,
                             num_key_value_heads=4, head_dim=6, intermediate_size=130),
    "qwen2": Qwen2Config(vocab_size=11, hidden_size=24, num_hidden_layers=4, num_attention_heads=8,
                         num_key_value_heads=8, intermediate_size=129),
    "qwen3": Qwen3Config(vocab_size=11, hidden_size=24, num_hidden_layers=4, num_attention_heads=12,
                         num_key_value_heads=6, head_dim=6, intermediate_size=128),
    "t5": T5,
}  # fmt: skip


@pytest.mark.parametrize("allocation", ["global", "uniform"])
@pytest.mark.parametrize("rounding", ["budget", "up"])
@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_devices_divide_every_layer(name, devices, rounding, allocation):
    config = FAMILIES[name]
    scores = uneven_scores(config, seed=devices)
    options = {"sparsity": 0.3, "gamma": 1.0, "rounding": rounding, "allocation": allocation}
    plan = allocate(scores, config, **options, tensor_parallel=devices)
    for block in plan.blocks:
        assert len(block.kept) % devices == 0
        assert block.kept
    shape = Shape.of(describe(describe(config).pruned_config(plan.kept)))
    assert devices in tensor_parallel_sizes(shape)
    if rounding == "budget":
        # Within half a step of the MLP (T5, where groups are few, has the coarsest): 8 neurons of one layer, or of all.
        step = 0.5 * ALIGN * 3 * config.hidden_size / plan.totals["prunable_before"]
        assert abs(plan.sparsity - 0.3) <= 1.01 * step * (len(plan.blocks) if allocation == "uniform" else 1)


def test_devices_and_few_widths_and_alignment_at_once():
    scores = uneven_scores(DEEP, seed=10)
    plan = allocate(scores, DEEP, sparsity=0.4, align=32, max_widths=3, tensor_parallel=2)
    assert len(set(pairs(plan))) <= 3
    assert all(groups % 2 == 0 and neurons % 32 == 0 for groups, neurons in pairs(plan))
    assert plan.sparsity == pytest.approx(0.4, abs=0.003)


def test_align_that_devices_do_not_divide():
    """Multiples of both."""
    plan = allocate(uneven_scores(DEEP, seed=11), DEEP, sparsity=0.4, align=5, tensor_parallel=4)
    assert all(neurons % 20 == 0 or neurons == 512 for _, neurons in pairs(plan))


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (llama(2, 1, 64), {"tensor_parallel": 2}, r"2 is impossible: model\.layers\.0\.self_attn has 1 key/value"),
        (llama(2, 4, 64), {"tensor_parallel": 8}, r"impossible: model\.layers\.0\.self_attn has 4 key/value heads"),
        (llama(2, 8, 7, 1), {"tensor_parallel": 8}, r"impossible: model\.layers\.0\.mlp has 7 neurons"),
        (llama(2, 3, 64), {"tensor_parallel": 2, "scope": "mlp"}, r"divide the 3 key/value heads .*--scope both"),
        (llama(2, 4, 65), {"tensor_parallel": 2, "scope": "attention", "sparsity": 0.05}, "the 65 neurons of"),
        (DEEP, {"tensor_parallel": 0}, "--tensor-parallel 0 must be at least 1"),
        (DEEP, {"max_widths": 0}, "--max-widths 0 must be at least 1"),
        (T5, {"max_widths": 2}, "--max-widths needs layers of one attention and one MLP"),
    ],
)  # fmt: skip
def test_what_is_impossible_is_refused(config, options, message):
    with pytest.raises(NirvanaError, match=message):
        allocate(uneven_scores(config, seed=0), config, **{"sparsity": 0.3, **options})


# ---- the price ------------------------------------------------------------------------------------------------------

RESTRICTIONS = {
    "align": {"align": 128},
    "max_widths": {"max_widths": 2},
    "tensor_parallel": {"tensor_parallel": 4},
    "allocation": {"allocation": "uniform"},
}


@pytest.mark.parametrize("name", RESTRICTIONS)
def test_the_price_is_the_difference_to_the_plan_without(name):
    scores = uneven_scores(DEEP, seed=12)
    plan = allocate(scores, DEEP, **{"sparsity": 0.4, "align": 1, **RESTRICTIONS[name]})
    free = allocate(scores, DEEP, sparsity=0.4, align=1)
    measured = plan.settings["kept_saliency"]
    assert measured["fraction"] == pytest.approx(held(scores, plan), abs=1e-6)
    assert measured["without"] == {name: pytest.approx(held(scores, free), abs=1e-6)}
    assert measured["fraction"] < measured["without"][name]
    assert free.settings["kept_saliency"]["without"] == {}


def test_defaults_have_no_price():
    settings = allocate(uneven_scores(DEEP, seed=12), DEEP, sparsity=0.4).settings
    assert settings["align"] == ALIGN
    assert settings["kept_saliency"]["without"] == {}


def test_the_price_in_words():
    settings = {"align": 128, "max_widths": 8, "kept_saliency": {"fraction": 0.9131, "without": {}}}
    assert kept_saliency_line(settings) is None  # nothing was asked for
    settings["kept_saliency"]["without"] = {"align": 0.9204, "max_widths": 0.915}
    said = "kept saliency 91.3 % (92.0 % without --align 128, 91.5 % without --max-widths 8)"
    assert kept_saliency_line(settings) == said
    assert kept_saliency_line({}) is None


def test_scores_of_zero_have_no_price():
    scores = {block.name: torch.zeros(block.size) for block in describe(DEEP).blocks}
    plan = allocate(scores, DEEP, sparsity=0.4, max_widths=2)
    assert plan.settings["kept_saliency"] is None
    assert PruningPlan.from_dict(json.loads(plan.to_json())).settings["kept_saliency"] is None


LINE = re.compile(r"kept saliency \d+\.\d % \(\d+\.\d % without --max-widths 1\)")


def test_prune_says_the_price_before_it_cuts(cli_here: Cli, llama_folder, tokens_file, tmp_path, monkeypatch):
    out = tmp_path / "out"
    command = ("prune", llama_folder, "--sparsity", 0.3, "--calibration", tokens_file, "--out", out, "--align", 1)
    # Whatever goes wrong while it cuts: the line stands already.
    with monkeypatch.context() as patch:
        patch.setattr("nirvana.pruning.save_checkpoint", lambda *_, **__: 1 / 0)
        outcome = cli_here(*command, "--max-widths", 1)
        assert (outcome.code, LINE.fullmatch(outcome.stdout.strip()) is None) == (1, False)
    outcome = cli_here(*command, "--max-widths", 1, "--gamma", 1)
    assert outcome.code == 0
    assert LINE.match(outcome.stdout)
    assert outcome.stderr == ""
    assert not LINE.search(cli_here(*command, "--max-widths", 1, "--overwrite", "--quiet").stdout)
    report = json.loads(cli_here(*command, "--max-widths", 1, "--overwrite", "--json").stdout)
    assert set(report["kept_saliency"]["without"]) == {"max_widths"}
    assert PruningPlan.load(out).settings["kept_saliency"] == report["kept_saliency"]
    assert AutoConfig.from_pretrained(out).model_type == "llama"


def test_plan_says_the_price(cli_here, llama_folder, saliency_file, tmp_path):
    command = ("plan", llama_folder, "--saliency", saliency_file, "--sparsity", 0.3, "--align", 1)
    outcome = cli_here(*command, "--max-widths", 1, "--out", tmp_path / "plan.json")
    assert outcome.code == 0
    assert LINE.search(outcome.stdout)
    report = json.loads(cli_here(*command, "--tensor-parallel", 2, "--json", "--out", tmp_path / "other.json").stdout)
    assert set(report["kept_saliency"]["without"]) == {"tensor_parallel"}
    assert all(len(block.kept) % 2 == 0 for block in PruningPlan.load(tmp_path / "other.json").blocks)


# ---- Seed-OSS, in place of Qwen2 ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seed_oss(tmp_path_factory):
    """A Qwen2 without sliding windows that keeps two of three heads: dense model, plan, checkpoint.

    Its configuration has keys of other families, which Qwen2 does not read and Seed-OSS does.
    """
    folder = tmp_path_factory.mktemp("seed-oss")
    dense = build(CONFIGS["qwen2-tied"], seed=0)
    dense.save_pretrained(folder / "dense")
    config = folder / "dense" / "config.json"
    strays = {"attention_bias": False, "attention_out_bias": True, "residual_dropout": 0.5}
    config.write_text(json.dumps(json.loads(config.read_text()) | strays))
    plan = uniform_plan(dense, groups=2, neurons=13, seed=0)
    return dense, plan, nirvana.apply_checkpoint(folder / "dense", plan, folder / "small")


def test_seed_oss_computes_what_qwen2_does(seed_oss):
    dense, plan, folder = seed_oss
    small = nirvana.load(folder)
    config = json.loads((folder / "config.json").read_text())
    assert type(small.config) is SeedOssConfig
    assert (config["head_dim"], config["attention_bias"], config["attention_out_bias"]) == (8, True, False)
    assert (config["attention_dropout"], config["residual_dropout"]) == (0.0, 0.0)
    with nirvana.masked(dense, plan) as masked:
        expected = logits(masked, inputs(dense, seed=1))
    torch.testing.assert_close(logits(small, inputs(dense, seed=1)), expected, rtol=0, atol=1e-5)


def test_seed_oss_is_whole_and_opens_in_vllm(seed_oss):
    report = nirvana.check(seed_oss[2], hashes=True)
    assert report.notes == ()
    opens = {opener.runtime: opener.opens for opener in report.openers}
    assert opens["vLLM"]
    assert opens["SGLang"]


def test_seed_oss_is_pruned_again(seed_oss, tmp_path):
    """Into unequal layers, which are those of Qwen2."""
    folder = seed_oss[2]
    small = nirvana.load(folder)
    plan = random_plan(small, seed=2)
    assert plan.architecture == "seed_oss"
    again = nirvana.load(nirvana.apply_checkpoint(folder, plan, tmp_path / "again"))
    assert again.config.model_type == "pruned_qwen2"
    with nirvana.masked(small, plan) as masked:
        expected = logits(masked, inputs(small, seed=3))
    torch.testing.assert_close(logits(again, inputs(small, seed=3)), expected, rtol=0, atol=1e-5)


def test_seed_oss_with_biases_that_qwen2_lacks_stays_uniform():
    settings = {"vocab_size": 97, "hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 32, "head_dim": 8}
    config = SeedOssConfig(**settings, num_attention_heads=4, num_key_value_heads=4, attention_out_bias=True)
    model = build(config, seed=0)
    with pytest.raises(NirvanaError, match="--allocation uniform"):
        nirvana.apply(model, random_plan(model, seed=0))
    plan = uniform_plan(model, groups=2, neurons=16, seed=0)
    small = nirvana.apply(model, plan)
    with nirvana.masked(model, plan) as masked:
        expected = logits(masked, inputs(model, seed=1))
    torch.testing.assert_close(logits(small, inputs(model, seed=1)), expected, rtol=0, atol=1e-5)


def test_sliding_windows_keep_qwen2():
    model = build(CONFIGS["qwen2"], seed=0)
    config = describe(model).pruned_config(uniform_plan(model, groups=3, neurons=16, seed=0).kept)
    assert config.model_type == "qwen2"
    assert "sliding_attention" in config.layer_types
