"""Criteria side by side at the same size: which cases there are, what they keep, and that the figures are right."""

from __future__ import annotations

import json
import math

import families
import numpy as np
import pytest
import torch

import nirvana
from nirvana import NirvanaError, Saliency, describe
from nirvana.calibration import load_batch, read_documents
from nirvana.comparison.bench import Bench
from nirvana.comparison.cases import Case, default_criteria, list_cases
from nirvana.comparison.equal import equal_plan
from nirvana.comparison.record import FILE, SCORES
from nirvana.comparison.table import groups
from nirvana.evaluation.text import text_windows
from nirvana.published import allocate_as_published
from nirvana.references import REFERENCES, PrunedReference, Reference
from nirvana.repair import repair
from nirvana.saliency.criteria import CRITERIA, RANDOM
from nirvana.saliency.kinds import WeightCriterion

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"num_examples": 4, "seq_len": 16, "window": 24, "windows": 5, "align": 4}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Two texts that are quick to tokenise: to calibrate on, and to evaluate on."""
    folder = tmp_path_factory.mktemp("texts")
    for name in ("hills", "seas"):
        (folder / f"{name}.txt").write_text(" ".join(f"{name} of the number {number}" for number in range(200)))
    return folder


@pytest.fixture
def compared(texts):
    """``compared(model, **options)``: the comparison, and its rows without times."""

    def run(model, **options):
        small = {**SMALL, "calibration": texts / "hills.txt", "texts": {"seas": texts / "seas.txt"}, "device": "cpu"}
        found = nirvana.compare(model, **{**small, **options})
        return found, [{k: v for k, v in row.items() if not k.endswith("seconds")} for row in found.rows]

    return run


def saliency(architecture, criterion, seed=0, **settings):
    generator = torch.Generator().manual_seed(seed)
    scores = {block.name: torch.rand(block.size, generator=generator) for block in architecture.blocks}
    return Saliency(scores, {"criterion": criterion, **settings})


def test_cases_are_every_combination_once():
    cases = list_cases(["nirvana", "flap"], [0.2, 0.5], ["both", "mlp"], ["common", "published"], ["none"])
    assert len(cases) == 2 * 2 + 2 * 2 * 2  # nirvana's own rule is the common one
    assert len(set(cases)) == len(cases)
    assert {case.allocation for case in cases if case.criterion == "nirvana"} == {"common"}
    repairs = {(case.allocation, case.repair) for case in cases if case.criterion == "flap"}
    assert repairs == {("common", "none"), ("published", "bias")}
    only = list_cases(["nirvana", "wanda-sp"], [0.2], ["mlp"], ["published"], ["none", "least-squares"])
    assert [tuple(case) for case in only] == [
        (name, 0.2, "mlp", "published", method)
        for name in ("nirvana", "wanda-sp")
        for method in ("none", "least-squares")
    ]
    twice = list_cases(["flap"], [0.2], ["mlp"], ["published"], ["none", "bias"])
    assert twice == [Case("flap", 0.2, "mlp", "published", "bias")]
    assert set(default_criteria()) == {*CRITERIA, RANDOM}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"criteria": ["nirvanna"]}, "--criteria 'nirvanna' is unknown; known are nirvana, "),
        ({"criteria": ["nirvana+nowhere"]}, "'nirvana+nowhere' is unknown"),
        ({"criteria": ["flap", "flap"]}, "--criteria names flap 2 times"),
        ({"criteria": []}, "--criteria is empty"),
        ({"sparsity": [0.2, 1.0]}, "--sparsity 1.0 must be above 0 and below 1"),
        ({"sparsity": [math.nan]}, "--sparsity nan must be above 0 and below 1"),
        ({"sparsity": [0.2, 0.2]}, "--sparsity names 0.2 2 times"),
        ({"sparsity": []}, "--sparsity is empty"),
        ({"scope": ["all"]}, "--scope 'all' must be one of both, attention, mlp"),
        ({"allocation": ["own"]}, "--allocation 'own' must be one of common, published"),
        ({"repair": ["lora"]}, "--repair 'lora' must be one of least-squares, bias, none"),
        ({"repair": ["none", "none"]}, "--repair names none 2 times"),
    ],
)
def test_unknown_and_doubled_names(changed, says):
    asked = {
        "criteria": ["flap"],
        "sparsity": [0.2],
        "scope": ["both"],
        "allocation": ["common"],
        "repair": ["none"],
    }
    with pytest.raises(NirvanaError) as error:
        list_cases(**{**asked, **changed})
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("criterion", "allocation"),
    [("nirvana", "common"), ("wanda-sp", "published"), ("flap", "published"), ("llm-pruner", "published")],
)
@pytest.mark.parametrize("scope", ["both", "mlp"])
@pytest.mark.parametrize("family", ["llama-biases", "qwen2"])
def test_every_rule_keeps_the_same_parameters(family, scope, criterion, allocation):
    """Within half an aligned step of one MLP, biases counted; the model that comes out has as many."""
    config = families._decoder(type(families.CONFIGS[family]), 48, 12, 4, 101)
    config.num_hidden_layers = 8
    config.layer_types = ["full_attention"] * 8
    if family == "llama-biases":
        config.attention_bias = config.mlp_bias = True
    architecture = describe(config)
    scores = saliency(architecture, criterion, seed=len(scope))
    equal = equal_plan(scores, architecture, sparsity=0.3, scope=scope, allocation=allocation, align=4, gamma=2.0)
    neuron = 3 * 48 + (2 if family == "llama-biases" else 0)
    assert abs(equal.difference) <= 4 * neuron / 2
    before = equal.plan.totals["parameters_before"]
    assert equal.target == before - round(0.3 * architecture.prunable_parameters)
    model = families.build(config, seed=0)
    small = nirvana.apply(model, equal.plan)
    assert sum(p.numel() for p in small.parameters()) == equal.target + equal.difference
    if scope == "mlp":
        assert all(len(equal.plan.kept[b.name]) == b.size for b in architecture.blocks if b.is_attention)


def test_steps_to_the_target_take_the_least_of_a_block_and_leave_whole_layers_whole():
    config = families._decoder(families.LlamaConfig, 48, 12, 4, 160)
    config.num_hidden_layers = 16
    architecture = describe(config)
    scores = saliency(architecture, "llm-pruner", seed=3)
    options = {"sparsity": 0.31, "align": 8, "scope": "mlp"}
    plain = allocate_as_published(scores, architecture, **options)
    equal = equal_plan(scores, architecture, **options, gamma=3.36, allocation="published")
    assert equal.moved > 0
    assert equal.plan.settings["steps_to_target"] == equal.moved
    changed = [b for b in architecture.blocks if equal.plan.kept[b.name] != plain.kept[b.name]]
    assert len(changed) == equal.moved
    for block in changed:
        before, after = set(plain.kept[block.name]), set(equal.plan.kept[block.name])
        assert abs(len(before) - len(after)) == 8
        assert len(before) < block.size  # the layers that the paper spares are spared
        more, less = max(before, after, key=len), min(before, after, key=len)
        values = scores[block.name]
        assert less < more
        assert max(values[list(more - less)]) <= min(values[list(less)])


def test_figures_are_those_of_the_pruned_model(compared, texts, llama_folder, tokenizer):
    """Against the stages by hand: score, plan, repair, apply, and log-softmax of all logits in float64."""
    found, rows = compared(
        llama_folder,
        criteria=["nirvana", "wanda-sp"],
        sparsity=[0.3],
        scope=["both"],
        allocation=["common"],
        repair=["none", "least-squares"],
    )
    model = nirvana.load(llama_folder, device="cpu")
    tokens = load_batch(texts / "hills.txt", tokenizer, num_examples=4, seq_len=16)
    windows = torch.stack(text_windows(tokenizer, read_documents(texts / "seas.txt"), 24, 24, 5))
    dense = log_softmax(model, windows)
    assert found.dense["texts"]["seas"]["nll"] == pytest.approx(nll(dense, windows), rel=1e-5)
    assert [(row["criterion"], row["repair"]) for row in rows] == [
        (name, method) for name in ("nirvana", "wanda-sp") for method in ("none", "least-squares")
    ]
    for row in rows:
        scores = nirvana.score(model, tokens, criterion=row["criterion"])
        plan = nirvana.allocate(scores, model, sparsity=0.3, align=4)
        changed = nirvana.load(llama_folder, device="cpu")
        repair(changed, plan, tokens, method=row["repair"])
        small = log_softmax(nirvana.apply(changed, plan), windows)
        kl = (dense.exp() * (dense - small)).sum(-1)[:, :-1].mean().item()
        assert row["texts"]["seas"]["kl"] == pytest.approx(kl, rel=1e-4)
        assert row["texts"]["seas"]["nll"] == pytest.approx(nll(small, windows), rel=1e-5)
        assert row["texts"]["seas"]["perplexity"] == pytest.approx(math.exp(nll(small, windows)), rel=1e-4)
        assert row["parameters"] == plan.totals["parameters_after"]
    assert found.scoring["nirvana"]["reads_calibration"]
    assert found.scoring["nirvana"]["seconds"] > 0


def log_softmax(model, windows):
    with torch.no_grad():
        return torch.log_softmax(model(windows).logits.double(), -1)


def nll(logs, windows):
    return -logs[:, :-1].gather(-1, windows[:, 1:, None]).mean().item()


def test_bias_repair_where_the_family_has_no_biases():
    """FLAP on a Llama: the mean of what is lost is added to every output layer; the dense model is as before."""
    model = families.build(families.CONFIGS["llama"], seed=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tokens = torch.randint(3, families.VOCABULARY, (6, 12), generator=torch.Generator().manual_seed(0))
    bench = Bench(model, tokens, align=1, gamma=3.36, seed=0, micro_batch=None)
    scores = saliency(bench.architecture, "flap")
    case = Case("flap", 0.3, "both", "published", "bias")
    small = bench.prune(case, scores)
    plain = bench.prune(case._replace(repair="none"), scores)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "biases of output layers in memory only" in small.facts["note"]
    assert plain.facts["note"] == ""
    # The first block reads the same in both models, so its bias is the mean of what it loses on the dense model.
    block = bench.architecture.blocks[0]
    lost = []
    layer = model.get_submodule(block.output)
    handle = layer.register_forward_pre_hook(lambda module, inputs: lost.append(inputs[0].double().flatten(0, -2)))
    with torch.no_grad():
        model(tokens)
    handle.remove()
    equal = equal_plan(
        scores, bench.architecture, sparsity=0.3, scope="both", allocation="published", align=1, gamma=3.36
    )
    gone = torch.ones(block.size, dtype=torch.bool)
    gone[list(equal.plan.kept[block.name])] = False
    assert gone.any()
    channels = gone.repeat_interleave(block.channels)
    expected = (lost[0][:, channels] @ layer.weight.double()[:, channels].T).mean(0)
    torch.testing.assert_close(small.model.get_submodule(block.output).bias.double(), expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert not torch.allclose(small.model(tokens).logits, plain.model(tokens).logits)


def test_impossible_cases_are_rows_and_the_others_go_on(compared, llama_folder, tmp_path):
    found, rows = compared(
        llama_folder,
        criteria=["magnitude"],
        sparsity=[0.2, 0.8],
        scope=["mlp", "both"],
        out=tmp_path / "out",
    )
    reasons = {(row["sparsity"], row["scope"]): row.get("impossible") for row in rows}
    assert "exceeds the mlp share" in reasons[0.8, "mlp"]
    assert reasons[0.8, "both"] is reasons[0.2, "mlp"] is reasons[0.2, "both"] is None
    assert "impossible: --sparsity 0.8 of all prunable parameters" in (tmp_path / "out" / "compare.md").read_text()
    assert [list(group) for group in groups(found.rows)] == [[0.2, "both"], [0.2, "mlp"], [0.8, "both"], [0.8, "mlp"]]


def test_same_model_same_rows_in_memory_and_from_disk(compared, llama_folder, tokenizer):
    options = {"criteria": ["random", "flap"], "sparsity": [0.4], "scope": ["both"], "seed": 3}
    _, rows = compared(llama_folder, **options)
    model = nirvana.load(llama_folder, device="cpu")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found, again = compared(model, tokenizer=tokenizer, **options)
    assert again == rows
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not found.scoring["random"]["reads_calibration"]
    assert found.scoring["flap"]["reads_calibration"]


@pytest.mark.parametrize("on_disk", [True, False])
def test_passes_are_shared_and_scores_are_those_of_each(compared, llama_folder, texts, tokenizer, tmp_path, on_disk):
    """AFR's forms share their walks, also as parts of sums; a sum takes the scores that its parts have."""
    names, passes = ["afr-abs", "nirvana+afr-gmm", "nirvana"], []
    out = tmp_path / "out"
    options = {"criteria": names, "sparsity": [0.3], "scope": ["mlp"], "allocation": ["common"]}
    with pytest.MonkeyPatch.context() as patch:
        scored = Bench.score
        patch.setattr(Bench, "score", lambda bench, names, step: (passes.append(names), scored(bench, names, step))[1])
        found, rows = compared(llama_folder, **options, **({"out": out} if on_disk else {}))
    assert passes == [["afr-abs", "afr-gmm"], ["nirvana"]]
    assert [row["criterion"] for row in rows] == names
    scoring = found.scoring
    assert scoring["afr-abs"] == scoring["afr-gmm"]
    assert scoring["afr-abs"]["together"] == ["afr-abs", "afr-gmm"]
    whole = scoring["nirvana+afr-gmm"]
    assert whole["seconds"] == scoring["nirvana"]["seconds"] + scoring["afr-gmm"]["seconds"]
    assert "together" not in whole
    if on_disk:
        assert "scored together, all in that time: afr-abs, afr-gmm" in (out / "compare.md").read_text()
        model = nirvana.load(llama_folder, device="cpu")
        tokens = load_batch(texts / "hills.txt", tokenizer, num_examples=4, seq_len=16)
        for name in (*names, "afr-gmm"):
            kept, alone = Saliency.load(out / SCORES.format(name)), nirvana.score(model, tokens, criterion=name)
            assert kept.settings == alone.settings
            assert all(torch.equal(kept[block], alone[block]) for block in alone)


def test_what_cannot_be_scored_is_a_reason(compared, llama_folder, monkeypatch):
    """Of its own rows and of sums with it; the others go on."""
    nowhere = WeightCriterion(lambda weight, gradient, part, scores: scores.fill_(math.nan))
    monkeypatch.setitem(CRITERIA, "nowhere", nowhere)
    options = {"sparsity": [0.3], "scope": ["mlp"], "allocation": ["common"]}
    found, rows = compared(llama_folder, criteria=["nowhere+random", "nowhere", "random+magnitude"], **options)
    assert list(found.scoring) == ["random", "magnitude", "random+magnitude"]
    assert not found.scoring["random+magnitude"]["reads_calibration"]
    assert ["NaN" in row.get("impossible", "") for row in rows] == [True, True, False]


def test_encoder_decoder(compared, t5_folder):
    _, rows = compared(
        t5_folder, criteria=["nirvana", "wanda-sp"], sparsity=[0.3], scope=["both"], repair=["none", "bias"]
    )
    assert len(rows) == 6
    assert not any("impossible" in row for row in rows)
    assert all(abs(row["difference"]) <= 4 * 3 * 32 / 2 for row in rows)
    assert all(row["texts"]["seas"]["kl"] > 0 for row in rows)


class TestReferences:
    """Through the registry, with a reference that is easy to check: some rows of down_proj set to zero."""

    @pytest.fixture(autouse=True)
    def registered(self, monkeypatch):
        def prune(model, tokens, sparsity, *, seed=0, scope="both"):
            if sparsity > 0.4:
                raise NirvanaError(f"zeros: --sparsity {sparsity} is too much")
            small = nirvana.apply(model, nirvana.allocate(saliency(describe(model), "random"), model, sparsity=1e-9))
            weight = small.model.layers[0].mlp.down_proj.weight
            rows = round(sparsity * len(weight))
            weight.data[:rows] = 0
            total = sum(p.numel() for p in small.parameters())
            zeros = rows * weight.shape[1]
            return PrunedReference(small, total - zeros, describe(small).prunable_parameters - zeros, "zeros only")

        monkeypatch.setitem(REFERENCES, "zeros", Reference(prune, scopes=("mlp",)))

    def test_rows_and_what_cannot_be(self, compared, llama_folder, tmp_path):
        found, rows = compared(
            llama_folder,
            criteria=["zeros", "magnitude"],
            sparsity=[0.25, 0.5],
            repair=["none", "least-squares"],
            out=tmp_path / "out",
        )
        mine = {(row["sparsity"], row["scope"]): row for row in rows if row["criterion"] == "zeros"}
        assert len(mine) == 4
        assert {row["allocation"] for row in mine.values()} == {"reference"}
        assert mine[0.5, "mlp"]["impossible"] == "zeros: --sparsity 0.5 is too much"
        assert mine[0.25, "both"]["impossible"] == "zeros is there with --scope mlp only"
        row = mine[0.25, "mlp"]
        model = nirvana.load(llama_folder, device="cpu")
        total, prunable = sum(p.numel() for p in model.parameters()), describe(model).prunable_parameters
        assert row["parameters"] == total - 8 * 48
        assert row["prunable"] == prunable - 8 * 48
        assert row["difference"] == round(0.25 * prunable) - 8 * 48
        assert row["note"] == "zeros only"
        assert row["texts"]["seas"]["kl"] > 0
        assert "zeros" not in found.scoring
        assert "zeros only" in (tmp_path / "out" / "compare.md").read_text()


def test_what_is_written_can_be_used(compared, llama_folder, tmp_path):
    """The scores are those of the rows: another plan can be made of them."""
    out = tmp_path / "out"
    found, rows = compared(llama_folder, criteria=["flap"], sparsity=[0.3], scope=["both"], out=out)
    scores = Saliency.load(out / SCORES.format("flap"))
    plan = nirvana.allocate(scores, nirvana.load(llama_folder), sparsity=0.3, align=4)
    assert plan.totals["parameters_after"] == rows[0]["parameters"]
    document = json.loads((out / FILE).read_text())
    assert document["rows"] == found.rows
    assert document["dense"]["parameters"] == plan.totals["parameters_before"]
    assert np.isfinite([row["texts"]["seas"]["kl"] for row in document["rows"]]).all()
