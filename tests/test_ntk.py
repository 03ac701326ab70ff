"""The NTK report against float64 autograd of the dense model and of the really sliced one."""

from __future__ import annotations

import json

import families
import pytest
import torch
from test_saliency import draw_tokens, in_float64, objective_value, state_of, units_of, used_model

from nirvana import NirvanaError, apply
from nirvana.architectures.inputs import model_inputs
from nirvana.saliency import ntk_report

pytestmark = pytest.mark.usefixtures("one_thread")


def probe(examples=3, length=12):
    return torch.randint(families.VOCABULARY, (examples, length), generator=torch.Generator().manual_seed(6))


def theta(model, tokens, objective) -> dict[str, torch.Tensor]:
    """Block -> sum |g| of each unit, float64, in the order of the units of `model`."""
    inputs = model_inputs(model, tokens)
    value = objective_value(objective, model(**inputs.arguments).logits, inputs.targets, inputs.valid)
    value.backward()
    result = {}
    for block, units in units_of(model).items():
        sums = []
        for unit in units:
            grads = [(model.get_parameter(key).grad, axis, where) for key, axis, where in unit]
            sums.append(sum((g[where] if axis == 0 else g[:, where]).abs().sum() for g, axis, where in grads))
        result[block] = torch.stack(sums)
    return result


@pytest.mark.parametrize("objective", ["max-logit", "nll"])
@pytest.mark.parametrize("name", ["llama-biases", "llama-head-dim", "qwen3", "t5", "t5-gated"])
def test_all_figures_are_those_of_autograd(name, objective):
    model, tokens = families.build(families.CONFIGS[name], 2), probe()
    plan = families.uniform_plan(model, 2, 16, seed=1)
    report = ntk_report(model, plan, tokens, objective=objective)
    assert json.loads(json.dumps(report)) == report
    dense = theta(in_float64(model), tokens, objective)
    # The sliced model has fewer units, and no masks.
    small = theta(in_float64(apply(model, plan)), tokens, objective)
    close = {"rel": 2e-5}
    totals = torch.zeros(3, dtype=torch.float64)
    assert [block["name"] for block in report["blocks"]] == list(plan.kept)
    for figures in report["blocks"]:
        block = figures["name"]
        kept = dense[block][list(plan.kept[block])].sum()
        expected = torch.stack([dense[block].sum(), kept, small[block].sum()])
        totals += expected
        assert [figures["dense"], figures["kept"], figures["pruned"]] == pytest.approx(expected.tolist(), **close)
        assert figures["drift"] == pytest.approx(abs(figures["dense"] - figures["pruned"]))
        assert figures["first_order_bound"] == pytest.approx(float(dense[block].sum() - kept), **close)
        assert figures["kept_fraction"] == pytest.approx(float(kept / dense[block].sum()), **close)
    total = report["total"]
    assert [total["dense"], total["kept"], total["pruned"]] == pytest.approx(totals.tolist(), **close)
    assert total["drift"] == pytest.approx(float(abs(totals[0] - totals[2])), rel=1e-3)
    assert total["first_order_bound"] == pytest.approx(float(totals[0] - totals[1]), **close)


def test_a_plan_that_keeps_everything_has_no_drift():
    model = families.build(families.CONFIGS["llama"], 2)
    report = ntk_report(model, families.uniform_plan(model, 4, 37, seed=0), probe())
    assert report["total"]["drift"] == report["total"]["first_order_bound"] == 0
    assert report["total"]["kept_fraction"] == 1
    assert report["total"]["dense"] > 0
    assert report["value"]["dense"] == report["value"]["pruned"]


def test_micro_batches_and_padding():
    model = families.build(families.CONFIGS["qwen2"], 2)
    plan, tokens = families.random_plan(model, 4), probe()
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    whole = ntk_report(model, plan, tokens, attention_mask=mask)
    parts = ntk_report(model, plan, tokens.masked_fill(mask == 0, 9), attention_mask=mask, micro_batch=2)
    assert parts["total"] == pytest.approx(whole["total"], rel=1e-4)
    assert whole["total"] != pytest.approx(ntk_report(model, plan, tokens)["total"], rel=1e-2)


def test_the_model_is_left_as_found():
    model = used_model("llama-tied")
    plan, before = families.random_plan(model, 0), state_of(model)
    ntk_report(model, plan, draw_tokens())
    after = state_of(model)
    for key in before:
        assert after[key] == before[key], key


def test_what_does_not_fit_is_refused():
    model, other = (families.build(families.CONFIGS[name], 2) for name in ("llama", "llama-tied"))
    plan = families.random_plan(model, 0)
    with pytest.raises(NirvanaError, match=r"block model\.layers\.0\.\w+: the plan was made for"):
        ntk_report(other, plan, probe())
    with pytest.raises(NirvanaError, match="--objective 'loss' is unknown"):
        ntk_report(model, plan, probe(), objective="loss")
    with pytest.raises(NirvanaError, match="at least 1 example of 2 tokens"):
        ntk_report(model, plan, probe()[:0])
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(NirvanaError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        ntk_report(model, plan, probe())
