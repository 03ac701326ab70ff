"""Steps, searches and presets: what `nirvana.prune` decides, and that it leaves the user's model alone."""

from __future__ import annotations

import copy
import json

import families
import pytest
import torch
from families import VOCABULARY

import nirvana
from nirvana.calibration import CalibrationBatch
from nirvana.deciding import decide
from nirvana.progress import Progress
from nirvana.recipe import PRESETS, Recipe
from nirvana.repair import repair
from nirvana.saliency import combine, score
from nirvana.selection import Probe
from nirvana.widths import WidthRule

RULE = WidthRule(0.4, align=1)

#: No window of it is like another.
TEXT = " ".join(str(number) for number in range(3000))


def batch(seed: int, examples: int = 8, length: int = 16) -> CalibrationBatch:
    generator = torch.Generator().manual_seed(seed)
    return CalibrationBatch(
        torch.randint(3, VOCABULARY, (examples, length), generator=generator), {"source": f"{seed}"}
    )


def run(model, batches, recipe, probe=None, rule=RULE):
    return decide(model, batches, None if probe is None else probe.tokens, rule, recipe, Progress())


def state(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", ["llama", "qwen2", "t5-gated"])
def test_each_step_scores_what_the_one_before_left(family):
    """By hand, from the public parts."""
    model = families.build(families.CONFIGS[family], 0)
    by_hand = copy.deepcopy(model)
    decision = run(model, [batch(1)], Recipe(criterion="mask-fisher", steps=2, repair="least-squares"))

    tokens = batch(1).tokens
    scores = score(by_hand, tokens, criterion="mask-fisher")
    half = nirvana.allocate(scores, by_hand, sparsity=0.2, align=1)
    repaired = copy.deepcopy(by_hand)
    repair(repaired, half, tokens)
    left = score(nirvana.apply(repaired, half), tokens, criterion="mask-fisher")
    scores = {name: torch.zeros_like(values) for name, values in scores.items()}
    for name, values in left.items():
        scores[name][list(half.kept[name])] = values
    whole = nirvana.allocate(scores, by_hand, sparsity=0.4, align=1)
    repair(by_hand, whole, tokens)

    assert decision.plan.kept == whole.kept
    assert all(set(whole.kept[name]) <= set(half.kept[name]) for name in whole.kept)
    assert all(torch.equal(value, state(by_hand)[name]) for name, value in state(model).items())
    assert decision.plan.settings["steps"] == 2
    assert decision.plan.settings["sparsity"] == 0.4


def test_steps_without_repair_leave_all_weights_as_they_were():
    model = families.build(families.CONFIGS["llama"], 2)
    before = state(model)
    decision = run(model, [batch(3)], Recipe(steps=3, repair="none"))
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())
    assert "repair" not in decision.plan.settings


def test_gamma_is_the_best_of_its_curve_and_what_the_plan_was_made_with():
    model = families.build(families.CONFIGS["llama"], 4)
    plan = run(model, [batch(5)], Recipe(search_gamma=True, repair="none"), batch(6)).plan
    curve = [point for point in plan.settings["gamma_search"] if "kl" in point]
    (chosen,) = (point for point in curve if point["gamma"] == plan.settings["gamma"])
    assert chosen["kl"] == min(point["kl"] for point in curve)
    scores = score(model, batch(5).tokens)
    again = nirvana.allocate(scores, model, sparsity=0.4, align=1, gamma=plan.settings["gamma"])
    assert again.kept == plan.kept


def test_candidates_are_chosen_and_then_used_for_every_step():
    model = families.build(families.CONFIGS["llama"], 7)
    batches, probe = [batch(seed) for seed in (8, 9, 10)], batch(11)
    chosen = run(copy.deepcopy(model), batches, Recipe(candidates=3, steps=2), probe).plan
    best = chosen.settings["selection"]["best"]
    kls = [candidate["kl"] for candidate in chosen.settings["selection"]["candidates"]]
    assert kls[best] == min(kls)
    alone = run(copy.deepcopy(model), [batches[best]], Recipe(steps=2)).plan
    assert alone.kept == chosen.kept


@pytest.mark.parametrize("how", ["mean", "median"])
def test_batches_are_combined(how):
    model = families.build(families.CONFIGS["llama"], 12)
    batches = [batch(seed) for seed in (13, 14, 15)]
    decision = run(model, batches, Recipe(batches=3, combine=how, repair="none"))
    expected = combine([score(model, each.tokens) for each in batches], how, model)
    assert all(torch.equal(decision.saliency[name], expected[name]) for name in expected)
    assert decision.saliency.settings["calibration_manifest"] == [each.manifest for each in batches]


def test_a_fraction_of_the_repair_lies_between():
    model = families.build(families.CONFIGS["llama"], 16)
    models = {}
    for strength in (0.0, 0.25, 1.0):
        models[strength] = copy.deepcopy(model)
        run(models[strength], [batch(17)], Recipe(repair_strength=strength))
    none, part, whole = (state(models[strength]) for strength in (0.0, 0.25, 1.0))
    changed = [name for name in whole if not torch.equal(whole[name], none[name])]
    assert changed
    for name in whole:
        torch.testing.assert_close(part[name], none[name] + 0.25 * (whole[name] - none[name]), rtol=1e-5, atol=1e-7)


def test_ntk_is_that_of_the_dense_weights():
    model = families.build(families.CONFIGS["llama"], 18)
    dense = copy.deepcopy(model)
    decision = run(model, [batch(19)], Recipe(ntk=True), batch(20))
    assert decision.ntk == nirvana.saliency.ntk_report(dense, decision.plan, batch(20).tokens)


def test_a_model_in_memory_is_left_as_it_was(tokenizer, tmp_path, llama_folder):
    model = nirvana.load(llama_folder, device="cpu")
    before = state(model)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    result = nirvana.prune(
        model, 0.3, tokenizer=tokenizer, calibration=text, num_examples=4, seq_len=16, **nirvana.preset("best")
    )
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())
    assert all(p.requires_grad for p in model.parameters())
    sliced = nirvana.apply(model, result.plan)
    assert any(not torch.equal(p, dict(sliced.named_parameters())[name]) for name, p in result.model.named_parameters())


def test_the_repaired_weights_are_what_is_written(tokenizer, tmp_path, llama_folder):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    options = {"calibration": text, "num_examples": 4, "seq_len": 16}
    result = nirvana.prune(llama_folder, 0.3, out=tmp_path / "out", **options)
    in_memory = nirvana.prune(llama_folder, 0.3, device="cpu", **options).model
    written = state(nirvana.load(tmp_path / "out", device="cpu"))
    assert all(torch.equal(p, written[name]) for name, p in in_memory.named_parameters())
    assert result.plan.settings["repair"]["method"] == "least-squares"


def test_a_preset_stands_in_for_defaults_wherever_it_stands(cli_here, tmp_path, llama_folder, tokens_file):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    common = ("--sparsity", 0.3, "--calibration", text, "--num-examples", 4, "--seq-len", 16, "--json")
    settings = []
    for number, options in enumerate((("--preset", "best", "--steps", 2), ("--steps", 2, "--preset", "best"))):
        outcome = cli_here("prune", llama_folder, *common, *options, "--out", tmp_path / str(number))
        assert outcome.code == 0, outcome
        settings.append(json.loads(outcome.stdout))
        plan = nirvana.PruningPlan.load(tmp_path / str(number))
        assert plan.settings["criterion"] == PRESETS["best"]["criterion"]
        assert plan.settings["steps"] == 2
        assert plan.settings["gamma_search"]
    assert {**settings[0], "checkpoint": ""} == {**settings[1], "checkpoint": ""}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batches": 0}, "--batches 0"),
        ({"candidates": 0}, "--candidates 0"),
        ({"batches": 2, "candidates": 2}, "give one of both"),
        ({"combine": "mode"}, "--combine 'mode'"),
        ({"steps": 0}, "--steps 0"),
        ({"steps": 2, "criterion": "magnitude"}, "--steps 2"),
        ({"repair": "glue"}, "--repair 'glue'"),
        ({"repair_ridge": 0}, "--repair-ridge 0"),
        ({"repair_strength": 1.5}, "--repair-strength 1.5"),
        ({"repair_strength": float("nan")}, "--repair-strength nan"),
        ({"gamma": 0.0}, "--gamma 0.0"),
        ({"probe_examples": 0, "candidates": 2}, "--probe-examples 0"),
        ({"num_examples": 10_000, "candidates": 2}, "disjoint"),
    ],
)
def test_refusals_come_in_one_line_and_write_nothing(llama_folder, tmp_path, options, says):
    with pytest.raises(nirvana.NirvanaError) as refusal:
        nirvana.prune(llama_folder, 0.3, out=tmp_path / "out", **options)
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == []


def test_probe_is_disjoint_from_the_batch(tokenizer, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    batches, probe = nirvana.pruning.draw(text, tokenizer, Recipe(search_gamma=True), num_examples=4, seq_len=16)
    [one] = batches
    assert not {tuple(row) for row in one.tokens.tolist()} & {tuple(row) for row in probe.tolist()}
    alone, none = nirvana.pruning.draw(text, tokenizer, Recipe(), num_examples=4, seq_len=16)
    assert none is None
    assert torch.equal(alone[0].tokens, one.tokens)


def test_the_best_preset_is_closer_than_published_settings(tokenizer):
    """On a random model with structure to lose; what it is worth on real text stands in benchmarks/quality.py."""
    model = families.build(families.CONFIGS["qwen2"], 22)
    probe = Probe(model, batch(23, examples=60).tokens)
    results = {}
    for name, options in (("published", {"repair": "none"}), ("best", {**PRESETS["best"], "gamma": 3.36})):
        options = {key: value for key, value in options.items() if key != "gamma"}
        small = copy.deepcopy(model)
        plan = run(small, [batch(24, examples=40)], Recipe(**options)).plan
        results[name] = probe.divergence(nirvana.apply(small, plan)).kl
    assert results["best"] < results["published"]
