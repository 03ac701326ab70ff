"""Allocation against the published counts and against the published rule, written again in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, SeedOssConfig, T5Config

from nirvana import NirvanaError, Saliency, allocate, describe
from nirvana.parameters import auto_class
from nirvana.rates import split_sparsity

FIXED = settings(derandomize=True, deadline=None, max_examples=150, database=None)

LLAMA_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    tie_word_embeddings=False,
)


def llama(layers: int, groups: int, ratio: int, head_dim: int, width: int, hidden: int = 24) -> LlamaConfig:
    """A configuration; `hidden` must be a multiple of the query heads, `groups * ratio`."""
    return LlamaConfig(
        vocab_size=11,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=groups * ratio,
        num_key_value_heads=groups,
        head_dim=head_dim,
        intermediate_size=width,
        tie_word_embeddings=False,
    )


T5 = T5Config(
    vocab_size=11,
    d_model=16,
    d_kv=4,
    num_heads=4,
    d_ff=24,
    num_layers=2,
    num_decoder_layers=3,
    decoder_start_token_id=0,
)
SMALL = llama(layers=4, groups=4, ratio=3, head_dim=6, width=40)


def random_scores(config, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {block.name: torch.rand(block.size, generator=generator) for block in describe(config).blocks}


def equal_scores(config) -> dict[str, torch.Tensor]:
    return {block.name: torch.ones(block.size) for block in describe(config).blocks}


def removed(plan, attention: bool) -> int:
    """Units that went, of one kind."""
    blocks = [block for block in plan.blocks if (block.unit == "kv_group") == attention]
    return sum(block.size - len(block.kept) for block in blocks)


# ---- the rule, again: dictionaries and loops, nothing of nirvana ----------------------------------------------------


def unit_costs(config: LlamaConfig) -> tuple[int, int]:
    """Parameters of one KV group (its query, key, value rows and output columns) and of one neuron."""
    ratio = config.num_attention_heads // config.num_key_value_heads
    return config.hidden_size * config.head_dim * (2 * ratio + 2), 3 * config.hidden_size


def kinds(config: LlamaConfig) -> tuple[list[str], list[str]]:
    layers = range(config.num_hidden_layers)
    return [f"model.layers.{i}.self_attn" for i in layers], [f"model.layers.{i}.mlp" for i in layers]


def published_counts(config: LlamaConfig, sparsity: float, gamma: float) -> tuple[int, int]:
    """Groups and neurons below the two thresholds."""
    group, neuron = unit_costs(config)
    groups = config.num_hidden_layers * config.num_key_value_heads
    neurons = config.num_hidden_layers * config.intermediate_size
    attention, mlp = groups * group, neurons * neuron
    rate = sparsity * (attention + mlp) / (attention + gamma * mlp)
    rates = [rate, gamma * rate]
    if rates[1] > 1:
        rates = [(sparsity * (attention + mlp) - mlp) / attention, 1.0]
    elif rates[0] > 1:
        rates = [1.0, (sparsity * (attention + mlp) - attention) / mlp]
    return math.floor(rates[0] * groups + 1e-9), math.floor(rates[1] * neurons + 1e-9)


def below_threshold(scores: dict[str, torch.Tensor], names: list[str], count: int) -> dict[str, set[int]]:
    """The `count` lowest units of all blocks; of equals, the one that stands first."""
    units = [
        (value, place, index) for place, name in enumerate(names) for index, value in enumerate(scores[name].tolist())
    ]
    gone: dict[str, set[int]] = {name: set() for name in names}
    for _, place, index in sorted(units)[:count]:
        gone[names[place]].add(index)
    return gone


def spare_best(values: list[float], gone: set[int], width: int) -> tuple[int, ...]:
    """Kept units after the best of `gone` were taken back until `width` are kept."""
    gone = set(gone)
    while len(values) - len(gone) < width:
        gone.remove(max(gone, key=lambda index: (values[index], index)))
    return tuple(index for index in range(len(values)) if index not in gone)


def published_plan(
    config: LlamaConfig, scores, sparsity: float, gamma: float, align: int
) -> dict[str, tuple[int, ...]]:
    attention, mlp = kinds(config)
    groups, neurons = published_counts(config, sparsity, gamma)
    kept = {}
    for name, gone in below_threshold(scores, attention, groups).items():
        kept[name] = spare_best(scores[name].tolist(), gone, 1)
    for name, gone in below_threshold(scores, mlp, neurons).items():
        size = len(scores[name])
        width = min(size, max(align, math.ceil((size - len(gone)) / align) * align))
        kept[name] = spare_best(scores[name].tolist(), gone, width)
    return kept


configs = st.builds(
    llama,
    layers=st.integers(1, 5),
    groups=st.integers(1, 4),
    ratio=st.sampled_from([1, 2, 3]),
    head_dim=st.sampled_from([2, 4, 10]),
    width=st.integers(1, 45),
    hidden=st.just(72),
).filter(lambda config: 72 % config.num_attention_heads == 0)


# ---- counts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sparsity", "groups", "neurons"), [(0.2, 17, 106_078), (0.4, 35, 212_157), (0.5, 44, 265_197)]
)
def test_llama_8b_counts_from_a_configuration(sparsity, groups, neurons):
    scores = random_scores(LLAMA_8B, 0)
    plan = allocate(scores, LLAMA_8B, sparsity=sparsity, gamma=3.36, rounding="up", align=1)
    assert (sum(b.size for b in plan.blocks if b.unit == "kv_group"), removed(plan, True)) == (256, groups)
    assert (sum(b.size for b in plan.blocks if b.unit == "neuron"), removed(plan, False)) == (
        458_752,
        neurons,
    )


def test_llama_8b_totals_are_the_known_ones():
    plan = allocate(random_scores(LLAMA_8B, 0), LLAMA_8B, sparsity=0.5)
    layer = 4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336
    assert plan.totals["prunable_before"] == 32 * layer
    # The published size of Llama-3.1-8B.
    assert plan.totals["parameters_before"] == 8_030_261_248
    gone = plan.totals["prunable_before"] - plan.totals["prunable_after"]
    assert plan.totals["parameters_after"] == 8_030_261_248 - gone
    assert gone == removed(plan, True) * 4096 * 128 * 10 + removed(plan, False) * 3 * 4096
    assert abs(plan.sparsity - 0.5) < 1e-5


@pytest.mark.parametrize("gamma", [0.2, 1.0, 3.36])
@pytest.mark.parametrize("sparsity", [0.1, 0.37, 0.8])
def test_split_follows_the_formula(sparsity, gamma):
    rates = split_sparsity(300, 700, sparsity, gamma)
    attention = sparsity * 1000 / (300 + gamma * 700)
    if attention > 1:
        assert rates.attention == 1
        assert rates.mlp == pytest.approx((1000 * sparsity - 300) / 700, rel=1e-12)
    elif gamma * attention > 1:
        assert rates.mlp == 1
        assert rates.attention == pytest.approx((1000 * sparsity - 700) / 300, rel=1e-12)
    else:
        assert rates.attention == pytest.approx(attention, rel=1e-12)
        assert rates.mlp == pytest.approx(gamma * attention, rel=1e-12)


@FIXED
@given(
    attention=st.integers(1, 10**9),
    mlp=st.integers(1, 10**9),
    sparsity=st.floats(1e-3, 0.999),
    gamma=st.floats(1e-3, 1e3),
)
def test_split_always_removes_what_was_asked(attention, mlp, sparsity, gamma):
    rates = split_sparsity(attention, mlp, sparsity, gamma)
    assert -1e-12 <= rates.attention <= 1
    assert -1e-12 <= rates.mlp <= 1
    total = rates.attention * attention + rates.mlp * mlp
    assert total == pytest.approx(sparsity * (attention + mlp), rel=1e-9)


def test_a_rate_above_one_is_clamped_and_the_rest_moved():
    group, neuron = unit_costs(SMALL)
    scores = random_scores(SMALL, 1)
    everything = 4 * (4 * group + 40 * neuron)
    plan = allocate(scores, SMALL, sparsity=0.9, gamma=1000.0)
    assert all(len(block.kept) == 8 for block in plan.blocks if block.unit == "neuron")
    asked = 0.9 * everything - removed(plan, False) * neuron
    # The MLPs keep 8 neurons each; the first whole group that covers the rest goes as well.
    assert removed(plan, True) == min(12, math.ceil(asked / group))
    plan = allocate(scores, SMALL, sparsity=0.6, gamma=0.001)
    assert all(len(block.kept) == 1 for block in plan.blocks if block.unit == "kv_group")
    assert abs(plan.sparsity - 0.6) * everything <= 8 * neuron / 2


# ---- which units ----------------------------------------------------------------------------------------------------


@FIXED
@given(
    config=configs,
    seed=st.integers(0, 10**6),
    sparsity=st.floats(0.02, 0.98),
    gamma=st.floats(0.1, 20),
    align=st.sampled_from([1, 2, 3, 8, 16]),
    levels=st.sampled_from([None, 5, 2]),
)
def test_up_is_the_published_rule(config, seed, sparsity, gamma, align, levels):
    """`levels` makes many equal scores."""
    scores = random_scores(config, seed)
    if levels:
        scores = {name: (values * levels).floor() for name, values in scores.items()}
    plan = allocate(scores, config, sparsity=sparsity, gamma=gamma, rounding="up", align=align)
    assert plan.kept == published_plan(config, scores, sparsity, gamma, align)


@pytest.mark.parametrize("seed", range(4))
def test_up_spares_the_best_group_and_removes_no_other_for_it(seed):
    """The published code compares each group with one threshold: a spared group is not paid for by another block."""
    scores = random_scores(SMALL, seed)
    # One layer of low scores, so that all its groups are among the lowest 8 of 16.
    scores["model.layers.2.self_attn"] *= 0.01
    plan = allocate(scores, SMALL, sparsity=0.5, gamma=1.0, rounding="up")
    assert removed(plan, True) == 7
    expected = published_plan(SMALL, scores, 0.5, 1.0, 8)
    assert len(expected["model.layers.2.self_attn"]) == 1
    assert plan.kept == expected


@pytest.mark.parametrize("rounding", ["up", "budget"])
def test_every_block_keeps_its_best_units(rounding):
    """One block scores far below all others: it keeps its best group, not its last, and its best `align` neurons."""
    scores = random_scores(SMALL, 2)
    for name in ("model.layers.1.self_attn", "model.layers.1.mlp"):
        scores[name] *= 1e-3
        scores[name][2] = 2e-3
    plan = allocate(scores, SMALL, sparsity=0.45, gamma=1.0, rounding=rounding)
    assert plan.kept["model.layers.1.self_attn"] == (2,)
    best = scores["model.layers.1.mlp"].topk(8).indices
    assert 2 in best
    assert plan.kept["model.layers.1.mlp"] == tuple(sorted(best.tolist()))


@FIXED
@given(
    config=configs,
    seed=st.integers(0, 10**6),
    sparsity=st.floats(0.02, 0.98),
    gamma=st.floats(0.05, 50),
    rounding=st.sampled_from(["up", "budget"]),
    align=st.sampled_from([1, 3, 8, 64]),
    allocation=st.sampled_from(["global", "uniform"]),
)
def test_what_stays_is_never_empty_and_aligned(config, seed, sparsity, gamma, rounding, align, allocation):
    """Also where `align` does not divide the size, or exceeds it; and what stays is the best of each block."""
    scores = random_scores(config, seed)
    options = {"sparsity": sparsity, "gamma": gamma, "rounding": rounding, "align": align, "allocation": allocation}
    plan = allocate(scores, config, **options)
    for block in plan.blocks:
        width = len(block.kept)
        assert width >= 1
        if block.unit == "neuron":
            assert width % align == 0 or width == block.size
            assert width >= min(align, block.size)
        best = scores[block.name].argsort(descending=True, stable=True)[:width]
        assert block.kept == tuple(sorted(best.tolist()))
    assert plan.totals["prunable_after"] == sum(
        len(block.kept) * unit_costs(config)[block.unit == "neuron"] for block in plan.blocks
    )


def test_ties_go_by_position():
    """All scores equal: the units that stand first go first, each block keeps its last ones."""
    config = llama(layers=3, groups=3, ratio=2, head_dim=4, width=12)
    options = {"sparsity": 0.5, "gamma": 1.0, "rounding": "up"}
    plan = allocate(equal_scores(config), config, align=4, **options)
    # Half of 36 neurons: 12 of the first layer, 6 of the second, spared to the next multiple of 4.
    assert [block.kept for block in plan.blocks if block.unit == "neuron"] == [
        (8, 9, 10, 11),
        (4, 5, 6, 7, 8, 9, 10, 11),
        tuple(range(12)),
    ]
    # Half of 9 groups, rounded down.
    first, *others = [block.kept for block in plan.blocks if block.unit == "kv_group"]
    assert first == (2,)
    assert others[-1] == (0, 1, 2)
    again = allocate(equal_scores(config), config, align=4, **options)
    assert again.to_json() == plan.to_json()


@pytest.mark.parametrize("rounding", ["up", "budget"])
def test_exactly_as_many_go_although_scores_tie_at_the_threshold(rounding):
    """Scores of three values: 'score <= threshold' would remove a third of all units at once."""
    config = llama(layers=4, groups=6, ratio=1, head_dim=4, width=50)
    scores = {name: (values * 3).floor() for name, values in random_scores(config, 3).items()}
    plan = allocate(scores, config, sparsity=0.125, gamma=1.0, rounding=rounding, align=1)
    assert removed(plan, False) == 25
    assert removed(plan, True) == 3


def test_scores_of_any_floating_type_are_ranked_as_numbers():
    scores = random_scores(SMALL, 4)
    plan = allocate(scores, SMALL, sparsity=0.4)
    double = {name: values.double() for name, values in scores.items()}
    assert allocate(double, SMALL, sparsity=0.4).kept == plan.kept
    shifted = {name: values - 0.5 for name, values in scores.items()}
    assert allocate(shifted, SMALL, sparsity=0.4).kept == plan.kept


@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_more_sparsity_never_brings_a_unit_back(allocation):
    """With rounding up, the kept sets of a block shrink one into the other."""
    scores = random_scores(SMALL, 5)
    before = {block.name: set(range(block.size)) for block in describe(SMALL).blocks}
    sizes = []
    for percent in range(3, 98, 5):
        plan = allocate(scores, SMALL, sparsity=percent / 100, gamma=1.5, rounding="up", align=4, allocation=allocation)
        for block in plan.blocks:
            assert set(block.kept) <= before[block.name]
            before[block.name] = set(block.kept)
        sizes.append(plan.totals["prunable_after"])
    assert len(set(sizes)) > 8


# ---- the budget -----------------------------------------------------------------------------------------------------


@FIXED
@given(
    config=configs,
    seed=st.integers(0, 10**6),
    sparsity=st.floats(0.02, 0.98),
    gamma=st.floats(0.1, 20),
    align=st.sampled_from([1, 3, 8]),
)
def test_budget_takes_the_nearest_reachable_count(config, seed, sparsity, gamma, align):
    """Against every position of the MLP threshold, given the groups that went."""
    scores = random_scores(config, seed)
    plan = allocate(scores, config, sparsity=sparsity, gamma=gamma, rounding="budget", align=align)
    group, neuron = unit_costs(config)
    attention, mlp = kinds(config)
    target = sparsity * plan.totals["prunable_before"] - removed(plan, True) * group
    reachable = set()
    for count in range(config.num_hidden_layers * config.intermediate_size + 1):
        lost = below_threshold(scores, mlp, count).values()
        size = config.intermediate_size
        kept = [min(size, max(align, math.ceil((size - len(gone)) / align) * align)) for gone in lost]
        reachable.add(sum(size - width for width in kept) * neuron)
    assert removed(plan, False) * neuron in reachable
    missed = abs(removed(plan, False) * neuron - target)
    assert missed == pytest.approx(min(abs(count - target) for count in reachable), abs=1e-6)
    # Attention gives what gamma asks for; more only where all MLPs together cannot pay.
    asked = min(published_counts(config, sparsity, gamma)[0], (config.num_key_value_heads - 1) * len(attention))
    groups = removed(plan, True)
    assert groups >= asked
    assert groups == asked or target + group > max(reachable)


@pytest.mark.parametrize("sparsity", [0.05, 0.1, 0.2, 0.4, 0.5, 0.6, 0.8])
def test_budget_is_exact_to_a_step_of_the_alignment(sparsity):
    config = llama(layers=6, groups=4, ratio=2, head_dim=8, width=512, hidden=64)
    plan = allocate(random_scores(config, 6), config, sparsity=sparsity)
    step = 8 * unit_costs(config)[1]
    assert abs(plan.sparsity - sparsity) * plan.totals["prunable_before"] <= step / 2


def test_budget_removes_more_when_asked_for_more():
    config = llama(layers=4, groups=2, ratio=1, head_dim=6, width=200)
    scores = random_scores(config, 7)
    plans = [allocate(scores, config, sparsity=percent / 100, scope="mlp") for percent in range(2, 90, 2)]
    before = {name: set(range(len(values))) for name, values in scores.items()}
    for plan in plans:
        for block in plan.blocks:
            assert set(block.kept) <= before[block.name]
            before[block.name] = set(block.kept)
    assert len({plan.totals["prunable_after"] for plan in plans}) > 40


# ---- scope ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocation", ["global", "uniform"])
@pytest.mark.parametrize("rounding", ["up", "budget"])
@pytest.mark.parametrize("scope", ["attention", "mlp"])
def test_scope_leaves_the_other_kind_whole_and_counts_both(scope, rounding, allocation):
    group, neuron = unit_costs(SMALL)
    everything = 4 * (4 * group + 40 * neuron)
    plan = allocate(random_scores(SMALL, 8), SMALL, sparsity=0.2, rounding=rounding, scope=scope, allocation=allocation)
    assert removed(plan, scope != "attention") == 0
    gone = removed(plan, scope == "attention") * (group if scope == "attention" else neuron)
    assert plan.totals["prunable_before"] == everything
    assert plan.totals["prunable_before"] - plan.totals["prunable_after"] == gone
    layers = 4 if allocation == "uniform" else 1
    step = layers * (group if scope == "attention" else 8 * neuron)
    if rounding == "budget":
        assert abs(gone - 0.2 * everything) <= step / 2
    else:
        assert 0 < gone <= 0.2 * everything


@pytest.mark.parametrize("count", [1, 3, 6, 11])
def test_scope_attention_takes_the_nearest_whole_group(count):
    group, neuron = unit_costs(SMALL)
    everything = 4 * (4 * group + 40 * neuron)
    for offset, expected in ((-0.4, count), (0.0, count), (0.4, count), (0.6, count + 1)):
        plan = allocate(
            random_scores(SMALL, 9), SMALL, sparsity=(count + offset) * group / everything, scope="attention"
        )
        assert removed(plan, True) == expected


@pytest.mark.parametrize("scope", ["attention", "mlp"])
def test_scope_refuses_more_than_its_share(scope):
    group, neuron = unit_costs(SMALL)
    share = 4 * group / (4 * group + 40 * neuron)
    share = share if scope == "attention" else 1 - share
    with pytest.raises(NirvanaError, match=f"exceeds the {scope} share of {share:.1%}"):
        allocate(random_scores(SMALL, 10), SMALL, sparsity=share + 0.001, scope=scope)
    plan = allocate(random_scores(SMALL, 10), SMALL, sparsity=share - 0.001, scope=scope)
    pruned = [block for block in plan.blocks if (block.unit == "kv_group") == (scope == "attention")]
    assert {len(block.kept) for block in pruned} == {1 if scope == "attention" else 8}


# ---- uniform --------------------------------------------------------------------------------------------------------

STOCK = [
    SMALL,
    MistralConfig(vocab_size=11, hidden_size=24, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=3,
                  head_dim=6, intermediate_size=44),
    Qwen2Config(vocab_size=11, hidden_size=24, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=3,
                intermediate_size=44),
    Qwen3Config(vocab_size=11, hidden_size=20, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=3,
                head_dim=10, intermediate_size=44),
    T5,
]  # fmt: skip


@pytest.mark.parametrize("rounding", ["up", "budget"])
@pytest.mark.parametrize("config", STOCK, ids=lambda config: config.model_type)
def test_uniform_gives_equal_counts_and_a_stock_configuration(config, rounding):
    scores = random_scores(config, 11)
    plan = allocate(scores, config, sparsity=0.4, gamma=1.0, align=4, allocation="uniform", rounding=rounding)
    counts = {unit: {len(b.kept) for b in plan.blocks if b.unit == unit} for unit in ("kv_group", "neuron")}
    assert len(counts["kv_group"]) == len(counts["neuron"]) == 1
    smaller = describe(config).pruned_config(plan.kept)
    # Llama refuses head counts that do not divide the hidden size; Mistral computes the same without that check.
    # Qwen2 has no head_dim for other readers than transformers; Seed-OSS does.
    others = {"llama": MistralConfig, "qwen2": SeedOssConfig}
    assert type(smaller) in {type(config), others.get(config.model_type)}
    assert not smaller.model_type.startswith("pruned")
    with torch.device("meta"):
        model = auto_class(smaller).from_config(smaller)
    assert sum(parameter.numel() for parameter in model.parameters()) == plan.totals["parameters_after"]


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("gamma", [0.3, 1.0, 4.0])
def test_uniform_budget_is_the_nearest_width(sparsity, gamma):
    """Given the groups, no other aligned width in all layers lies nearer to the target."""
    group, neuron = unit_costs(SMALL)
    plan = allocate(random_scores(SMALL, 12), SMALL, sparsity=sparsity, gamma=gamma, allocation="uniform")
    target = sparsity * plan.totals["prunable_before"] - removed(plan, True) * group
    missed = [abs(4 * (40 - width) * neuron - target) for width in (8, 16, 24, 32, 40)]
    assert abs(removed(plan, False) * neuron - target) == pytest.approx(min(missed), abs=1e-6)


def test_uniform_up_rounds_each_layer_up():
    plan = allocate(
        random_scores(SMALL, 13), SMALL, sparsity=0.4, gamma=1.0, allocation="uniform", rounding="up", align=8
    )
    # 40 % of 4 groups and of 40 neurons: 1.6 and 16 go, 24 is a multiple of 8.
    assert {len(block.kept) for block in plan.blocks if block.unit == "kv_group"} == {3}
    assert {len(block.kept) for block in plan.blocks if block.unit == "neuron"} == {24}


@pytest.mark.parametrize("seed", range(5))
def test_uniform_t5_keeps_the_same_heads_where_one_position_bias_serves_them(seed):
    scores = random_scores(T5, seed)
    plan = allocate(scores, T5, sparsity=0.5, gamma=1.0, align=1, allocation="uniform")
    for stack, layers in (("encoder", 2), ("decoder", 3)):
        names = [f"{stack}.block.{index}.layer.0.SelfAttention" for index in range(layers)]
        together = sum(scores[name] for name in names)
        best = tuple(sorted(together.topk(2).indices.tolist()))
        assert [plan.kept[name] for name in names] == [best] * layers
    for index in range(3):
        name = f"decoder.block.{index}.layer.1.EncDecAttention"
        assert plan.kept[name] == tuple(sorted(scores[name].topk(2).indices.tolist()))


def test_global_t5_ranks_encoder_decoder_and_cross_attention_together():
    scores = random_scores(T5, 14)
    plan = allocate(scores, T5, sparsity=0.5, gamma=1.0, rounding="up", align=1)
    for attention, count in ((True, 16), (False, 60)):
        names = [b.name for b in describe(T5).blocks if b.is_attention == attention]
        assert len(names) == (8 if attention else 5)
        gone = below_threshold(scores, names, count)
        for name in names:
            if len(gone[name]) < len(scores[name]):
                assert set(plan.kept[name]).isdisjoint(gone[name])
    assert describe(T5).pruned_config(plan.kept).model_type == "pruned_t5"


# ---- what the plan says about itself --------------------------------------------------------------------------------


def test_plan_carries_its_settings_and_those_of_the_scores():
    scores = Saliency(random_scores(SMALL, 15), {"criterion": "nirvana", "calibration_sha256": "ab"})
    plan = allocate(scores, SMALL, sparsity=0.25, gamma=2.0, rounding="up", align=4, scope="mlp")
    kept = sum(float(scores[name][list(units)].sum()) for name, units in plan.kept.items())
    assert plan.settings.pop("kept_saliency")["fraction"] == pytest.approx(kept / sum(s.sum() for s in scores.values()))
    assert plan.settings == {
        "sparsity": 0.25,
        "gamma": 2.0,
        "rounding": "up",
        "align": 4,
        "scope": "mlp",
        "allocation": "global",
        "max_widths": None,
        "tensor_parallel": 1,
        "criterion": "nirvana",
        "calibration_sha256": "ab",
    }
    assert plan.architecture == "llama"
    plan.check_fits(describe(SMALL))


def test_a_model_and_its_configuration_give_the_same_plan():
    scores = random_scores(SMALL, 16)
    model = auto_class(SMALL).from_config(SMALL)
    plans = [allocate(scores, source, sparsity=0.5).to_json() for source in (SMALL, model, describe(SMALL))]
    assert plans[0] == plans[1] == plans[2]


@pytest.mark.parametrize("tied", [True, False])
def test_totals_are_those_of_the_model(tied):
    """A T5 may have a head of its own, which its configuration need not tell; biases go with their units."""
    model = auto_class(T5).from_config(T5)
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    totals = allocate(random_scores(T5, 22), model, sparsity=0.4, align=1).totals
    assert totals["parameters_before"] == sum(parameter.numel() for parameter in model.parameters())
    small = describe(T5).pruned_config(allocate(random_scores(T5, 22), T5, sparsity=0.4, align=1).kept)
    with torch.device("meta"):
        after = sum(parameter.numel() for parameter in auto_class(small).from_config(small).parameters())
    assert totals["parameters_after"] == after + (0 if tied else 11 * 16)
    config = LlamaConfig(**{**SMALL.to_dict(), "attention_bias": True, "mlp_bias": True})
    plan = allocate(random_scores(config, 22), config, sparsity=0.4)
    group, neuron = unit_costs(config)
    biases = removed(plan, True) * (3 + 2) * 6 + removed(plan, False) * 2
    gone = removed(plan, True) * group + removed(plan, False) * neuron
    assert plan.totals["prunable_before"] - plan.totals["prunable_after"] == gone
    assert plan.totals["parameters_before"] - plan.totals["parameters_after"] == gone + biases


def test_the_scores_are_left_alone():
    scores = random_scores(SMALL, 17)
    copies = {name: values.clone() for name, values in scores.items()}
    allocate(scores, SMALL, sparsity=0.5)
    assert all(torch.equal(scores[name], copies[name]) for name in copies)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 0}, "--sparsity 0 must be above 0 and below 1"),
        ({"sparsity": 1}, "--sparsity 1 "),
        ({"sparsity": -1}, "--sparsity -1 "),
        ({"sparsity": 50}, "--sparsity 50 "),
        ({"sparsity": math.nan}, "--sparsity nan "),
        ({"sparsity": math.inf}, "--sparsity inf "),
        ({"gamma": 0}, "--gamma 0 must be a positive number"),
        ({"gamma": -3.36}, "--gamma -3.36 "),
        ({"gamma": math.nan}, "--gamma nan "),
        ({"gamma": math.inf}, "--gamma inf "),
        ({"align": 0}, "--align 0 must be at least 1"),
        ({"align": -8}, "--align -8 "),
        (
            {"rounding": "down"},
            "--rounding 'down' must be one of up, budget|--rounding 'down' must be one of budget, up",
        ),
        ({"scope": "head"}, "--scope 'head' must be one of both, attention, mlp"),
        ({"allocation": "layer"}, "--allocation 'layer' must be one of global, uniform"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(NirvanaError, match=message):
        allocate(random_scores(SMALL, 18), SMALL, **{"sparsity": 0.5, **arguments})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite_are_refused_by_block(value):
    scores = random_scores(SMALL, 19)
    scores["model.layers.2.mlp"][7] = value
    with pytest.raises(NirvanaError, match=r"block model\.layers\.2\.mlp is not finite"):
        allocate(scores, SMALL, sparsity=0.5)


def test_missing_scores_are_refused_by_block():
    scores = random_scores(SMALL, 20)
    del scores["model.layers.3.self_attn"]
    with pytest.raises(NirvanaError, match=r"no scores for block model\.layers\.3\.self_attn"):
        allocate(scores, SMALL, sparsity=0.5)


@pytest.mark.parametrize("shape", [(39,), (41,), (40, 1), (0,), ()])
def test_misshapen_scores_are_refused_by_block(shape):
    scores = random_scores(SMALL, 21)
    scores["model.layers.0.mlp"] = torch.ones(shape)
    with pytest.raises(NirvanaError, match=r"block model\.layers\.0\.mlp has 40 units, its saliency has shape"):
        allocate(scores, SMALL, sparsity=0.5)
