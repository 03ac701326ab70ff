"""Plans by the rules of other papers: layers that stay whole, one ranking of both kinds, rates of layers."""

from __future__ import annotations

import families
import pytest
import torch

from nirvana import NirvanaError, Saliency, allocate, describe
from nirvana.published import allocate_as_published, keep_ratios, published
from nirvana.saliency.criteria import CRITERIA

pytestmark = pytest.mark.usefixtures("one_thread")


def config(layers=6, width=40):
    made = families._decoder(families.LlamaConfig, 24, 12, 4, width)
    made.num_hidden_layers = layers
    return made


def saliency(architecture, criterion, seed=0, **settings):
    generator = torch.Generator().manual_seed(seed)
    scores = {block.name: torch.rand(block.size, generator=generator) for block in architecture.blocks}
    return Saliency(scores, {"criterion": criterion, **settings})


def removed(architecture, plan):
    return sum((b.size - len(plan.kept[b.name])) * b.parameters_per_unit for b in architecture.blocks)


def test_every_criterion_says_what_its_paper_does():
    rules = {name: (published(name).allocation, published(name).scope) for name in CRITERIA}
    assert {name for name, rule in rules.items() if rule == ("global", "both")} == {
        "nirvana",
        "magnitude",
        "mask-fisher",
        "mask-abs",
    }
    assert rules["flap"] == ("joint", "both")
    assert rules["cfsp"] == rules["cfsp-faithful"] == ("layer-ratios", "mlp")
    assert rules["lorap"] == ("uniform", "mlp")
    assert published("random").allocation == published("nirvana+flap").allocation == "global"


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5])
def test_joint_ranks_units_of_both_kinds_and_weighs_their_parameters(sparsity):
    """FLAP's rule by hand: from the best down, until the kept parameters are nearest to what is to be kept."""
    architecture = describe(config())
    scores = saliency(architecture, "flap", seed=1)
    plan = allocate_as_published(scores, architecture, sparsity=sparsity, align=1)
    units = [
        (float(scores[b.name][j]), b.parameters_per_unit, b.name, j) for b in architecture.blocks for j in range(b.size)
    ]
    units.sort(reverse=True)
    target, total = (1 - sparsity) * architecture.prunable_parameters, 0
    best = (abs(target), 0)
    for count, (_, weight, _, _) in enumerate(units, 1):
        total += weight
        best = min(best, (abs(total - target), count))
    kept = {(name, j) for _, _, name, j in units[: best[1]]}
    assert all(any((b.name, j) in kept for j in range(b.size)) for b in architecture.blocks), "else one unit is spared"
    assert {(name, j) for name, indices in plan.kept.items() for j in indices} == kept


def test_joint_spares_the_best_unit_of_a_block_that_would_go():
    architecture = describe(config())
    scores = saliency(architecture, "flap")
    scores["model.layers.2.self_attn"].mul_(1e-3)
    plan = allocate_as_published(scores, architecture, sparsity=0.5, align=8)
    assert plan.kept["model.layers.2.self_attn"] == (int(scores["model.layers.2.self_attn"].argmax()),)
    assert all(len(plan.kept[b.name]) % 8 == 0 for b in architecture.blocks if not b.is_attention)
    assert abs(removed(architecture, plan) / architecture.prunable_parameters - 0.5) < 0.03


def test_llm_pruner_leaves_first_and_last_layers_whole():
    """4 and 2 of 32 layers: of 16, 2 and 1; the 13 between them carry the whole sparsity, at one rate."""
    architecture = describe(config(layers=16, width=160))
    plan = allocate_as_published(saliency(architecture, "llm-pruner"), architecture, sparsity=0.4)
    kept = [(len(plan.kept[f"model.layers.{i}.self_attn"]), len(plan.kept[f"model.layers.{i}.mlp"])) for i in range(16)]
    assert kept[:2] == [(4, 160)] * 2
    assert kept[15:] == [(4, 160)]
    assert len(set(kept[2:15])) == 1
    assert kept[2] != (4, 160)
    assert abs(removed(architecture, plan) / architecture.prunable_parameters - 0.4) < 0.02
    with pytest.raises(NirvanaError, match=r"--sparsity 0\.9 is impossible: the first 2 and the last 1 layers stay"):
        allocate_as_published(saliency(architecture, "llm-pruner"), architecture, sparsity=0.9)


def test_uniform_is_that_of_allocate_with_one_rate():
    architecture = describe(config())
    scores = saliency(architecture, "wanda-sp")
    ours = allocate_as_published(scores, architecture, sparsity=0.4)
    assert ours.kept == allocate(scores, architecture, sparsity=0.4, gamma=1.0, allocation="uniform").kept


def test_global_is_allocate():
    architecture = describe(config())
    scores = saliency(architecture, "nirvana")
    assert (
        allocate_as_published(scores, architecture, sparsity=0.4).kept
        == allocate(scores, architecture, sparsity=0.4).kept
    )


def test_keep_ratios_by_hand():
    sigma = torch.tensor([0.2, 0.3, 0.4], dtype=torch.float64)
    torch.testing.assert_close(keep_ratios(sigma, 0.5), torch.tensor([1 / 3, 1 / 2, 2 / 3], dtype=torch.float64))
    # 0.4 / 0.3 * 0.9 = 1.2 would be more than all: the largest deviation shrinks to 0.3 (1 / 0.9 - 1) / 1.05.
    shrunk = 0.3 * (1 / 0.9 - 1) / 1.05
    expected = torch.tensor([0.3 - shrunk, 0.3, 0.3 + shrunk], dtype=torch.float64) / 0.3 * 0.9
    ratios = keep_ratios(sigma, 0.1)
    torch.testing.assert_close(ratios, expected)
    assert ratios.max() < 1
    equal = keep_ratios(torch.full((3,), 0.5, dtype=torch.float64), 0.2)
    torch.testing.assert_close(equal, torch.full((3,), 0.8, dtype=torch.float64))


@pytest.mark.parametrize("scope", [None, "both"])
@pytest.mark.parametrize("sparsity", [0.1, 0.3])
def test_layer_ratios_follow_the_importance_of_layers(sparsity, scope):
    architecture = describe(config(layers=4, width=400))
    importance = {f"model.layers.{i}": value for i, value in enumerate((0.30, 0.10, 0.05, 0.18))}
    scores = saliency(architecture, "cfsp", layer_importance=importance)
    plan = allocate_as_published(scores, architecture, sparsity=sparsity, scope=scope)
    widths = [len(plan.kept[f"model.layers.{i}.mlp"]) for i in range(4)]
    assert widths[0] > widths[3] > widths[1] > widths[2]
    assert all(width % 8 == 0 for width in widths)
    groups = [len(plan.kept[f"model.layers.{i}.self_attn"]) for i in range(4)]
    assert (groups == [4] * 4) is (scope is None)
    assert abs(removed(architecture, plan) / architecture.prunable_parameters - sparsity) < 0.02
    sigma = torch.sigmoid(13.1072 * (torch.tensor(list(importance.values()), dtype=torch.float64) - 0.1575))
    if scope is None:
        # The mean rate of the MLPs that was solved for gives these widths back, to half a step of the alignment.
        ratios = keep_ratios(sigma, 1 - sum(widths) / 1600)
        assert all(abs(width - 400 * ratio) <= 8 for width, ratio in zip(widths, ratios.tolist(), strict=True))


def test_what_cannot_be_is_refused():
    architecture = describe(config())
    with pytest.raises(NirvanaError, match=r"--sparsity 0\.9 is impossible: the scope holds \d\d\.\d%"):
        allocate_as_published(saliency(architecture, "flap"), architecture, sparsity=0.9, scope="mlp")
    with pytest.raises(NirvanaError, match="has no layer_importance"):
        allocate_as_published(saliency(architecture, "cfsp"), architecture, sparsity=0.2)
    with pytest.raises(NirvanaError, match=r"--sparsity 1\.5 must be"):
        allocate_as_published(saliency(architecture, "flap"), architecture, sparsity=1.5)


@pytest.mark.parametrize("criterion", ["flap", "cfsp", "lorap", "llm-pruner"])
def test_t5_is_planned_too(criterion):
    architecture = describe(families.CONFIGS["t5-gated"])
    importance = {f"{stack}.block.{i}": 0.1 * (i + 1) for stack in ("encoder", "decoder") for i in range(2)}
    plan = allocate_as_published(
        saliency(architecture, criterion, layer_importance=importance), architecture, sparsity=0.2, align=1
    )
    assert abs(removed(architecture, plan) / architecture.prunable_parameters - 0.2) < 0.03
