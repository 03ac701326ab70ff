"""AFR against autograd through the singular values in float64, and its aggregations unit by unit."""

from __future__ import annotations

import json

import families
import pytest
import torch
from test_saliency import draw_tokens, in_float64, state_of, units_of, used_model
from test_saliency_masks import RIGHT, model_and_tokens
from test_saliency_rivals import gradients, members
from transformers.modeling_layers import GradientCheckpointingLayer

from nirvana import NirvanaError, Saliency, allocate, describe, score
from nirvana.architectures.inputs import model_inputs
from nirvana.ops import use_backend
from nirvana.ops.backends import reference_mixture
from nirvana.published import allocate_as_published, published
from nirvana.saliency.afr import ABS, ABS_GMM, FORMS, GMM, polar_factor, score_forms, walk_features, weight_scores
from nirvana.saliency.afr.gradients import walk_pairs
from nirvana.saliency.afr.terms import added_terms
from nirvana.saliency.afr.units import _aggregated
from nirvana.saliency.objectives import OBJECTIVES

pytestmark = pytest.mark.usefixtures("one_thread")

#: Query heads per key/value head 3, 1 with biases, 4 with q/k norms; T5 plain and gated.
MODELS = ("llama", "llama-biases", "qwen3", "t5", "t5-gated")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distance(found, truth) -> float:
    return float((found - truth).norm() / truth.norm())


# ---- the polar factor -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [1, 1e-3], ids=["alike", "spread"])
@pytest.mark.parametrize("shape", [(7, 19), (19, 7), (13, 13), (1, 5), (5, 1), (64, 48)])
def test_the_polar_factor_is_the_gradient_of_the_singular_values_sum(shape, spread):
    x = draw(*shape)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    x = ((u * torch.logspace(0, torch.tensor(spread).log10(), len(s), dtype=torch.float64)) @ v).requires_grad_()
    (truth,) = torch.autograd.grad(torch.linalg.svdvals(x).sum(), x)
    found = polar_factor(x.detach())
    assert found.dtype == torch.float64
    assert 0 < distance(found, truth) < 1e-6


@pytest.mark.parametrize("shape", [(7, 19), (19, 7)])
def test_directions_without_a_singular_value_are_left_out(shape):
    x = draw(*shape)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s[3:] = 0
    assert distance(polar_factor((u * s) @ v), u[:, :3] @ v[:3]) < 1e-9
    s[3], s[4] = 1e-5 * s[0], 1e-7 * s[0]  # either side of the tolerance
    assert distance(polar_factor((u * s) @ v), u[:, :4] @ v[:4]) < 1e-5
    assert torch.equal(polar_factor(torch.zeros(shape)), torch.zeros(shape, dtype=torch.float64))


def test_equal_rows_in_bf16_have_one_direction():
    x = draw(1, 24).to(torch.bfloat16).expand(6, -1)
    assert distance(polar_factor(x), x.double() / x.double().norm()) < 1e-12


# ---- the gradients --------------------------------------------------------------------------------------------------


def feature_gradients(model, tokens, mask=None) -> dict[str, torch.Tensor]:
    """Matrix -> dF/dw, through torch.linalg.svdvals of each example's real tokens, in each layer's own output."""
    inputs, sums, handles = model_inputs(model, tokens, mask), [], []

    def hook(real):
        def measure(module, arguments, result):
            features = result[0] if isinstance(result, tuple) else result
            means = [torch.linalg.svdvals(x[known]).mean() for x, known in zip(features, real, strict=True)]
            sums.append(sum(means) / len(means))

        return measure

    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer):
            encoder = inputs.arguments.get("attention_mask")
            real = encoder.bool() if name.startswith("encoder.") else inputs.valid
            handles.append(module.register_forward_hook(hook(real)))
    try:
        model(**inputs.arguments)
    finally:
        for handle in handles:
            handle.remove()
    config = model.config
    encoder_decoder = config.is_encoder_decoder
    layers = config.num_layers + config.num_decoder_layers if encoder_decoder else config.num_hidden_layers
    assert len(sums) == layers
    parameters = matrices_of(model)
    return dict(zip(parameters, torch.autograd.grad(sum(sums), list(parameters.values())), strict=True))


def matrices_of(model) -> dict[str, torch.nn.Parameter]:
    used = {key for units in units_of(model).values() for unit in units for key, _, _ in unit if key.endswith("weight")}
    return {key: parameter for key, parameter in model.named_parameters() if key in used}


@pytest.mark.parametrize("mask", [None, RIGHT, RIGHT.flip(1)], ids=["whole", "right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_refers_gradient_is_that_of_autograd_through_singular_values(name, mask):
    model, tokens = model_and_tokens(name)
    model, found = in_float64(model), {}

    def keep(block, part, weight, gradient):
        found[part.tensor] = gradient

    walk_features(model, describe(model), tokens, mask, 3, keep)
    for key, truth in feature_gradients(model, tokens, mask).items():
        # `walk` adds up micro-batches in fp32.
        assert 0 < distance(found[key].double(), truth) < 1e-6, key
    whole: dict[str, torch.Tensor] = {}
    walk_features(model, describe(model), tokens, mask, None, lambda b, part, w, g: whole.update({part.tensor: g}))
    for key, truth in feature_gradients(model, tokens, mask).items():
        assert distance(whole[key], truth) < 1e-10, key


@pytest.mark.parametrize("name", ["llama", "llama-head-dim", "t5", "t5-gated"])
def test_signed_sums_of_what_is_multiplied_are_equal(name):
    """Free of any oracle: up rows and down columns, v and o, q and k of a unit, for both gradients."""
    model, tokens = model_and_tokens(name)
    model, sums = in_float64(model), {}

    def add(block, part, weight, features, loss):
        for index, gradient in enumerate((features, loss)):
            units = (weight * gradient).sum(1 - part.axis).view(-1, part.unit).sum(1)
            sums[part.tensor.removesuffix(".weight"), index] = units

    walk_pairs(model, describe(model), OBJECTIVES["nll"], tokens, RIGHT, None, add)
    pairs = (("up_proj", "down_proj"), ("wi", "wo"), ("wi_1", "wo"), ("v_proj", "o_proj"), ("v", "o"))
    pairs = (*pairs, ("q_proj", "k_proj"), ("q", "k"))
    compared = 0
    for (module, index), ours in sums.items():
        block, leaf = module.rsplit(".", 1)
        # The relative-position bias is added to q k, so T5 holds to it too; relu is its own derivative times its input.
        for other in (second for first, second in pairs if first == leaf):
            torch.testing.assert_close(ours, sums[f"{block}.{other}", index], rtol=0, atol=1e-13 * float(ours.norm()))
            assert ours.norm() > 0
            compared += 1
    assert compared == 2 * sum(2 if block.is_attention else 1 for block in describe(model).blocks)


# ---- weights --------------------------------------------------------------------------------------------------------


def expected_terms(model, tokens, signed, mask=None) -> dict[str, torch.Tensor]:
    """Matrix -> S, float64."""
    model = in_float64(model)
    parameters, terms = matrices_of(model), {}
    both = feature_gradients(model, tokens, mask), gradients(model, tokens, mask)
    for key, weight in parameters.items():
        products = [weight.detach() * each[key] for each in both]
        products = products if signed else [product.abs() for product in products]
        terms[key] = sum((p - p.mean()) / ((p - p.mean()) ** 2).mean().sqrt() for p in products)
    return terms


@pytest.mark.parametrize("name", MODELS)
def test_weight_scores_are_those_of_the_formula(name):
    model, tokens = model_and_tokens(name)
    truth, found = expected_terms(model, tokens, signed=False), {}

    def keep(tensor, part, scores):
        assert part.tensor == tensor
        assert scores.dtype == torch.float32
        found[tensor] = scores

    weight_scores(model, describe(model), tokens, keep)
    assert set(found) == set(truth), "every matrix, no bias"
    for key, scores in truth.items():
        assert 0 < distance(found[key].double(), scores) < 1e-4, key


def test_terms_of_equal_products_are_zero():
    weight, loss = draw(5, 7).float(), draw(5, 7, seed=1)
    for signed in (False, True):
        terms = added_terms(weight, torch.zeros(5, 7), loss.float(), signed)
        products = weight.double() * loss.float() if signed else (weight.double() * loss.float()).abs()
        truth = (products - products.mean()) / products.std(correction=0)
        torch.testing.assert_close(terms.double(), truth, rtol=1e-5, atol=1e-6)


# ---- units ----------------------------------------------------------------------------------------------------------


def by_unit(model, terms, block) -> list[torch.Tensor]:
    """The m scores of each unit."""
    rows = []
    for unit in members(model, block):
        parts = [(terms[f"{layer}.weight"], where, axis) for _, where, layer, axis in unit]
        rows.append(torch.cat([(t[where] if axis == 0 else t[:, where]).flatten() for t, where, axis in parts]))
    return rows


@pytest.mark.parametrize("mask", [None, RIGHT.flip(1)], ids=["whole", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_mean_and_abs_are_those_of_the_formula(name, mask):
    model, tokens = model_and_tokens(name)
    absolute, signed = (expected_terms(model, tokens, signed, mask) for signed in (False, True))
    for filler in (0, 55):
        padded = tokens if mask is None else tokens.masked_fill(mask == 0, filler)
        ours = {c: score(model, padded, criterion=c, attention_mask=mask) for c in ("afr-mean", "afr-abs")}
        for block in units_of(model):
            mean = torch.stack([row.abs().mean() for row in by_unit(model, absolute, block)])
            net = torch.stack([row.mean().abs() for row in by_unit(model, signed, block)])
            for criterion, truth in (("afr-mean", mean), ("afr-abs", net)):
                found = ours[criterion][block]
                assert found.dtype == torch.float32
                torch.testing.assert_close(found.double(), truth, rtol=1e-4, atol=1e-4 * float(truth.max()))


@pytest.mark.parametrize("name", ["llama", "t5-gated"])
def test_clipped_forms_clip_each_unit_by_its_own_mixture(name):
    """The bounds of the reference, fitted to the scores of the formula."""
    model, tokens = model_and_tokens(name)
    signed = expected_terms(model, tokens, signed=True)
    with use_backend("torch"):
        ours = {criterion: score(model, tokens, criterion=criterion) for criterion in ("afr-gmm", "afr-abs-gmm")}
    units = near = changed = 0
    for block in units_of(model):
        rows = torch.stack(by_unit(model, signed, block)).float()
        low, high, count = torch.empty(len(rows)), torch.empty(len(rows)), torch.empty(len(rows), dtype=torch.int32)
        reference_mixture.mixture(rows, 5, rows.shape[1] // 50, low, high, count)
        clipped = torch.stack([row.clamp(a, b) for row, a, b in zip(rows.double(), low, high, strict=True)])
        for criterion, truth in (("afr-gmm", clipped.abs().mean(1)), ("afr-abs-gmm", clipped.mean(1).abs())):
            error = (ours[criterion][block].double() - truth).abs()
            near += int((error <= 1e-4 * truth.max()).sum())
            units += len(rows)
        changed += int((clipped.abs().mean(1) < 0.99 * rows.double().abs().mean(1)).sum())
    # A rounding in the scores may decide what is the last outlier.
    assert near >= 0.99 * units
    assert changed > 0.1 * units / 2


def test_aggregations_by_hand():
    """Two units: one pulls one way, one both ways; then with an outlier at each end."""
    calm = torch.linspace(-1, 1, 100).repeat(2, 1) * 0.1
    calm[0] += 1
    rows = calm.clone()
    rows[1, 0], rows[1, -1] = -40.0, 60.0
    with use_backend("torch"):
        plain = _aggregated({"a": ABS}, {True: rows.clone()})
        scores = _aggregated(FORMS | {"again": ABS}, {True: rows.clone(), False: rows.clone()})
    assert plain["a"].tolist() == scores["afr-abs"].tolist() == scores["again"].tolist()
    assert scores["afr-mean"].tolist() == pytest.approx(rows.double().abs().mean(1).tolist(), rel=1e-12)
    assert scores["afr-abs"].tolist() == pytest.approx([1, abs(float(rows[1].double().mean()))], rel=1e-6)
    assert float(scores["afr-abs"][1]) > 0.19
    # The outliers become the calm scores that are next to them, of equal size.
    assert float(scores["afr-gmm"][1]) == pytest.approx(float(calm[1].abs().mean()), rel=0.05)
    assert float(scores["afr-abs-gmm"][1]) < 1e-6
    assert float(scores["afr-abs-gmm"][0]) == pytest.approx(1, rel=0.01)


# ---- behaviour ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", families.ALL)
def test_every_family_is_scored_and_planned(name):
    model, tokens = model_and_tokens(name)
    scores = score_forms(model, tokens, attention_mask=RIGHT)
    assert list(scores) == list(FORMS)
    for criterion, found in scores.items():
        assert list(found) == [block.name for block in describe(model).blocks]
        assert all(torch.isfinite(values).all() and (values >= 0).all() for values in found.values())
        as_published = allocate_as_published(found, model, sparsity=0.2, align=1)
        assert published(criterion).scope == as_published.settings["scope"] == "mlp"
        for plan in (as_published, allocate(found, model, sparsity=0.3, align=1)):
            plan.check_fits(describe(model))
            assert any(len(plan.kept[block.name]) < block.size for block in describe(model).blocks)


@pytest.mark.parametrize("name", ["llama-biases", "t5"])
def test_several_forms_at_once_are_those_of_score_and_the_same_every_time(name):
    model, tokens = model_and_tokens(name)
    together = score_forms(model, tokens, objective="max-logit", micro_batch=3)
    for criterion in FORMS:
        alone = score(model, tokens, criterion=criterion, objective="max-logit", micro_batch=3)
        assert alone.settings == together[criterion].settings
        assert all(torch.equal(alone[block], together[criterion][block]) for block in alone)


@pytest.mark.parametrize("name", ["llama", "qwen3", "t5-gated"])
def test_micro_batches_give_the_scores_of_one_batch(name):
    """A matrix of features is one example's, so the division changes nothing."""
    model, tokens = model_and_tokens(name)
    model = in_float64(model)
    whole = score_forms(model, tokens, attention_mask=RIGHT)
    for size in (1, 3):
        ours = score_forms(model, tokens, attention_mask=RIGHT, micro_batch=size)
        for criterion, scores in whole.items():
            for block, values in scores.items():
                torch.testing.assert_close(ours[criterion][block], values, rtol=1e-5, atol=1e-5 * float(values.max()))


def test_a_criterion_of_ones_own_and_a_sum():
    model, tokens = model_and_tokens("llama-tied")
    ours = score_forms(model, tokens, {"mine": GMM, "other": ABS_GMM})
    assert ours["mine"].settings["criterion"] == "mine"
    together = score(model, tokens, criterion="nirvana+afr-abs")
    assert together.settings["criterion"] == "nirvana+afr-abs"


def test_half_precision_progress_and_the_model_left_as_found():
    model = used_model("llama-biases").to(torch.bfloat16)
    before, calls = state_of(model), []
    hooks = [len(module._forward_hooks) for module in model.modules()]
    scores = score(model, draw_tokens(), criterion="afr-abs-gmm", micro_batch=2, progress=lambda: calls.append(0))
    after = state_of(model)
    assert all(after[key] == before[key] for key in before)
    assert all(values.dtype == torch.float32 and torch.isfinite(values).all() for values in scores.values())
    assert len(calls) == sum(part.scored for block in describe(model).blocks for part in block.slices)
    assert hooks == [len(module._forward_hooks) for module in model.modules()]


def test_what_is_wrong_is_named():
    model, tokens = model_and_tokens("llama")
    with pytest.raises(NirvanaError, match="criterion 'afr-abs' needs a calibration batch"):
        score(model, criterion="afr-abs")
    with pytest.raises(NirvanaError, match="--micro-batch 0 must be at least 1"):
        score(model, tokens, criterion="afr-abs", micro_batch=0)
    with pytest.raises(NirvanaError, match="--objective 'loss' is unknown"):
        score(model, tokens, criterion="afr-abs", objective="loss")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[2, 3] = float("inf")
    with pytest.raises(NirvanaError, match=r"parameter model\.layers\.1\.mlp\.up_proj\.weight holds infinity"):
        score(model, tokens, criterion="afr-abs")


def test_a_gradient_that_overflows_is_named():
    """All is finite but the gradient of what reads a huge embedding through a tiny weight."""
    model, tokens = model_and_tokens("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.fill_(1e30)
            layer.mlp.up_proj.weight.mul_(1e-30)
            layer.mlp.gate_proj.weight.mul_(1e10)
    with pytest.raises(
        NirvanaError, match=r"the gradient of model\.layers\.\d\.mlp\.\w+\.weight holds NaN or infinity"
    ):
        score(model, tokens, criterion="afr-mean")


def test_from_the_command_line(cli_here, llama_folder, tokens_file, tmp_path):
    path, plan = tmp_path / "s.safetensors", tmp_path / "plan.json"
    asked = ("--calibration", tokens_file, "--criterion", "afr-abs-gmm", "--out", path, "--json")
    outcome = cli_here("score", llama_folder, *asked)
    assert outcome.code == 0, outcome.stderr
    assert json.loads(outcome.stdout)["settings"]["objective"] == "nll"
    assert Saliency.load(path).settings["criterion"] == "afr-abs-gmm"
    outcome = cli_here("plan", llama_folder, "--sparsity", 0.3, "--saliency", path, "--out", plan)
    assert outcome.code == 0, outcome.stderr
