"""Closed-form repair of output layers: against float64 least squares, on every family."""

from __future__ import annotations

import copy

import families
import pytest
import torch
from families import VOCABULARY

import nirvana
from nirvana.architectures.inputs import model_inputs
from nirvana.repair import LEAST_SQUARES, RIDGE, repair
from nirvana.repair.least_squares import Regression
from nirvana.repair.strength import choose_strength
from nirvana.repair.weights import OutputWeights
from nirvana.selection import Probe


def tokens(seed: int, examples: int = 12, length: int = 18) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (examples, length), generator=torch.Generator().manual_seed(seed))


def outputs(model) -> dict[str, torch.Tensor]:
    """All parameters of the output layers."""
    layers = {block.output for block in nirvana.describe(model).blocks}
    return {name: p.detach().clone() for name, p in model.named_parameters() if name.rpartition(".")[0] in layers}


def activations(model, batch: torch.Tensor) -> dict[str, torch.Tensor]:
    """Inputs of all output layers, ``[positions, channels]``."""
    seen = {}
    handles = [
        model.get_submodule(block.output).register_forward_pre_hook(
            lambda module, inputs, name=block.output: seen.__setitem__(name, inputs[0].flatten(0, -2))
        )
        for block in nirvana.describe(model).blocks
    ]
    with torch.no_grad():
        model(**model_inputs(model, batch).arguments)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [7, 5000])  # less and more tokens than inputs, and than a chunk
def test_regression_is_the_ridge_solution(bias, count):
    generator = torch.Generator().manual_seed(count)
    x, r = torch.randn(count, 11, generator=generator) + 0.5, torch.randn(count, 5, generator=generator) - 1
    weight = torch.rand(count, generator=generator) + 0.1
    fit = Regression(11, 5, bias, x.device)
    for part in torch.arange(count).split(3000):
        fit.add(x[part], r[part], weight[part])
    change, offset = fit.solve(0.3)
    # The same as one least-squares problem with the ridge as further rows, which torch solves by QR.
    x, r, scale = x.double(), r.double(), weight.double().sqrt()[:, None]
    if bias:
        centre_x, centre_r = ((weight.double()[:, None] * v).sum(0) / weight.double().sum() for v in (x, r))
        x, r = x - centre_x, r - centre_r
    ridge = (0.3 * (scale * x).pow(2).sum(0).mean()).sqrt() * torch.eye(11, dtype=torch.float64)
    rows, right = torch.cat([scale * x, ridge]), torch.cat([scale * r, torch.zeros(11, 5, dtype=torch.float64)])
    expected = torch.linalg.lstsq(rows, right).solution.T
    torch.testing.assert_close(change, expected, rtol=1e-5, atol=1e-6)
    if bias:
        torch.testing.assert_close(offset, centre_r - expected @ centre_x, rtol=1e-5, atol=1e-6)
    else:
        assert offset is None


def test_regression_without_any_activation_changes_nothing():
    fit = Regression(4, 3, False, torch.device("cpu"))
    fit.add(torch.zeros(9, 4), torch.randn(9, 3), torch.ones(9))
    assert torch.equal(fit.solve(1e-2)[0], torch.zeros(3, 4, dtype=torch.float64))


@pytest.mark.parametrize("family", families.ALL)
def test_each_layer_minimises_its_own_error_after_those_before_it(family):
    """Layer after layer: with what comes out of the repaired layers before it, no other weights are better."""
    model = families.build(families.CONFIGS[family], 0)
    plan, batch = families.random_plan(model, 1), tokens(2)
    dense = copy.deepcopy(model)
    repair(model, plan, batch, ridge=RIDGE)
    seen = activations(model, batch)
    for block in nirvana.describe(model).blocks:
        before, after = dense.get_submodule(block.output), model.get_submodule(block.output)
        kept = torch.zeros(block.size, dtype=torch.bool)
        kept[list(plan.kept[block.name])] = True
        kept = kept.repeat_interleave(block.channels)
        assert torch.equal(after.weight[:, ~kept], torch.zeros_like(after.weight[:, ~kept]))
        if kept.all():
            assert torch.equal(after.weight, before.weight)
            continue
        x = seen[block.output].double()
        full = x @ before.weight.double().T
        weight = 1 / full.pow(2).sum(1)
        change = torch.zeros(x.shape[1], full.shape[1], dtype=torch.float64)
        change[kept] = (after.weight - before.weight)[:, kept].double().T
        lost = x[:, ~kept] @ before.weight[:, ~kept].double().T
        if after.bias is not None:
            lost = lost - (after.bias - before.bias).double()
        x = x[:, kept]
        # At the minimum the gradient by the change is zero: X^T w (X D - R) + ridge mean(diag C) D.
        centred = x - (weight[:, None] * x).sum(0) / weight.sum() if after.bias is not None else x
        scale = (weight[:, None] * centred.pow(2)).sum(0).mean()
        gradient = (weight[:, None] * x).T @ (x @ change[kept] - lost) + RIDGE * scale * change[kept]
        size = ((weight[:, None] * x).T @ lost).abs().max() + RIDGE * scale * change.abs().max()
        assert gradient.abs().max() < 2e-5 * size, block.name


@pytest.mark.parametrize("family", families.ALL)
def test_slicing_the_repaired_model_changes_nothing(family):
    model = families.build(families.CONFIGS[family], 3)
    plan = families.random_plan(model, 4)
    others = {name: p.clone() for name, p in model.named_parameters() if name not in outputs(model)}
    repair(model, plan, tokens(5))
    assert all(torch.equal(dict(model.named_parameters())[name], p) for name, p in others.items())
    arguments = families.inputs(model, 6)
    torch.testing.assert_close(
        families.logits(nirvana.apply(model, plan), arguments), families.logits(model, arguments), rtol=1e-4, atol=1e-4
    )


def test_repair_brings_the_model_closer_on_held_out_tokens():
    """On a random model too: what is removed can partly be told from what is kept."""
    model = families.build(families.CONFIGS["llama"], 7)
    plan = families.random_plan(model, 8)
    probe = Probe(model, tokens(9, examples=40))
    dense = OutputWeights(model, nirvana.describe(model))
    divergences = {}
    for method in ("none", LEAST_SQUARES):
        repair(model, plan, tokens(10, examples=60), method=method)
        divergences[method] = probe.divergence().kl
        dense.restore()
    assert divergences[LEAST_SQUARES] < divergences["none"]
    assert probe.divergence().kl == pytest.approx(0, abs=1e-6)


def test_a_bias_takes_the_mean_of_what_is_lost():
    model = families.build(families.CONFIGS["llama-biases"], 11)
    plan, batch = families.random_plan(model, 12), tokens(13)
    dense = copy.deepcopy(model)
    repair(model, plan, batch, method="bias")
    seen = activations(model, batch)
    for block in nirvana.describe(model).blocks:
        before, after = dense.get_submodule(block.output), model.get_submodule(block.output)
        kept = torch.zeros(block.size, dtype=torch.bool)
        kept[list(plan.kept[block.name])] = True
        removed = ~kept.repeat_interleave(block.channels)
        lost = seen[block.output].double()[:, removed] @ before.weight.double()[:, removed].T
        torch.testing.assert_close(after.bias.double(), before.bias.double() + lost.mean(0), rtol=1e-5, atol=1e-5)
        assert torch.equal(after.weight[:, ~removed], before.weight[:, ~removed])


def test_same_bits_every_time():
    results = []
    for _ in range(2):
        model = families.build(families.CONFIGS["qwen2"], 14)
        repair(model, families.random_plan(model, 15), tokens(16))
        results.append(outputs(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_dropout_of_a_model_in_training_is_off():
    results = []
    for training in (False, True):
        model = families.build(families.CONFIGS["t5"], 14).train(training)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.5
        repair(model, families.random_plan(model, 15), tokens(16))
        assert model.training == training
        results.append(outputs(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_bf16_model_stays_bf16():
    model = families.build(families.CONFIGS["llama"], 17).bfloat16()
    plan = families.random_plan(model, 18)
    repair(model, plan, tokens(19))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_strength_is_chosen_by_the_probe():
    model = families.build(families.CONFIGS["llama"], 20)
    plan, probe = families.random_plan(model, 21), Probe(model, tokens(22))
    dense = OutputWeights(model, nirvana.describe(model))
    repair(model, plan, tokens(23, examples=2, length=6))  # far too little to fit to
    found = choose_strength(dense.blends(), probe)
    best = min(point["kl"] for point in found["curve"])
    assert probe.divergence().kl == pytest.approx(best, rel=1e-6)
    assert (found["attention"], found["mlp"]) != (1.0, 1.0)


def test_blends_reach_from_masked_to_repaired():
    model = families.build(families.CONFIGS["llama-biases"], 24)
    plan = families.random_plan(model, 25)
    dense = OutputWeights(model, nirvana.describe(model))
    repair(model, plan, tokens(26), method="none")
    masked = outputs(model)
    dense.restore()
    repair(model, plan, tokens(26))
    repaired = outputs(model)
    blends = dense.blends()
    blends.set(attention=0.0, mlp=0.0)
    assert all(torch.equal(value, masked[name]) for name, value in outputs(model).items())
    blends.set(attention=1.0, mlp=0.0)
    for name, value in outputs(model).items():
        assert torch.equal(value, (repaired if "self_attn" in name else masked)[name])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"ridge": 0.0}, ("--repair-ridge 0.0", "positive")),
        ({"ridge": -1.0}, ("--repair-ridge -1.0", "positive")),
        ({"ridge": float("nan")}, ("--repair-ridge nan", "positive")),
        ({"ridge": 1e-40}, ("block model.layers.0", "--repair-ridge 1e-40 is too small")),
        ({"method": "magic"}, ("'magic'", "least-squares, bias, none")),
        ({"method": "bias"}, ("model.layers.0.self_attn.o_proj", "has no bias", "least-squares")),
    ],
)
def test_refusals(options, says):
    model = families.build(families.CONFIGS["llama"], 27)
    plan = families.random_plan(model, 28)
    with pytest.raises(nirvana.NirvanaError) as refusal:
        repair(model, plan, tokens(29, examples=1, length=4), **options)
    assert [part for part in says if part not in str(refusal.value)] == []


def test_activations_that_are_not_finite_are_refused():
    model = families.build(families.CONFIGS["llama"], 30)
    model.model.layers[1].mlp.up_proj.weight.data[3] = float("nan")
    with pytest.raises(nirvana.NirvanaError, match=r"model\.layers\.1\.mlp\.up_proj"):
        repair(model, families.random_plan(model, 31), tokens(32))
