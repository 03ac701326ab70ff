"""The probe against KL and cross-entropy of whole logits in float64, for every family."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from families import ALL, CONFIGS, VOCABULARY, build, random_plan
from torch import Tensor, nn
from transformers import PreTrainedModel

import nirvana
from nirvana import NirvanaError
from nirvana.architectures.inputs import IGNORE, model_inputs
from nirvana.selection import Probe, probe

pytestmark = pytest.mark.usefixtures("one_thread")


def draw(seed: int, examples: int = 5, length: int = 20) -> Tensor:
    return torch.randint(VOCABULARY, (examples, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def exact(dense: PreTrainedModel, pruned: PreTrainedModel, tokens: Tensor) -> tuple[float, float]:
    """KL and negative log-likelihood from logits of the whole vocabulary, models and sums in float64."""
    dense, pruned = copy.deepcopy(dense).double(), copy.deepcopy(pruned).double()
    inputs = model_inputs(dense, tokens)
    log_p, log_q = (F.log_softmax(model(**inputs.arguments).logits, dim=-1) for model in (dense, pruned))
    known = inputs.targets != IGNORE
    kl = F.kl_div(log_q[known], log_p[known], reduction="sum", log_target=True) / known.sum()
    return kl.item(), F.nll_loss(log_q[known], inputs.targets[known]).item()


@pytest.mark.parametrize("name", ALL)
def test_masked_model_against_float64_and_against_the_sliced_model(name):
    model = build(CONFIGS[name], 1)
    plan, tokens = random_plan(model, 2), draw(3)
    look = Probe(model, tokens)
    small = nirvana.apply(model, plan)
    kl, nll = exact(model, small, tokens)
    with nirvana.masked(model, plan):
        ours = look.divergence()
    assert kl > 0.01
    assert ours.kl == pytest.approx(kl, rel=2e-5)
    assert ours.nll == pytest.approx(nll, rel=2e-6)
    assert ours.perplexity == pytest.approx(torch.tensor(nll).exp().item(), rel=2e-5)
    assert ours.tokens == tokens.shape[0] * (10 if model.config.is_encoder_decoder else 19)
    sliced = look.divergence(small)
    assert (sliced.kl, sliced.nll) == pytest.approx((ours.kl, ours.nll), rel=2e-5)
    # The mask is gone: this is the dense model again, to the bit.
    assert look.divergence().kl == pytest.approx(0, abs=1e-7)


def test_changed_weights_are_seen():
    model = build(CONFIGS["llama"], 4)
    look = Probe(model, draw(5))
    before = copy.deepcopy(model)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= 1.5
    assert look.divergence().kl == pytest.approx(exact(before, model, look.tokens)[0], rel=2e-5)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_parts_of_batch_positions_and_vocabulary_change_nothing(name, monkeypatch):
    model = build(CONFIGS[name], 6)
    plan, tokens = random_plan(model, 7), draw(8)
    results = []
    for micro_batch, positions in ((None, 1024), (1, 1024), (2, 7)):
        monkeypatch.setattr(probe, "POSITIONS", positions)
        look = Probe(model, tokens, micro_batch=micro_batch)
        with nirvana.masked(model, plan):
            results.append(look.divergence())
    assert results[0].tokens == results[1].tokens == results[2].tokens
    for result in results[1:]:
        assert (result.kl, result.nll) == pytest.approx((results[0].kl, results[0].nll), rel=1e-6)


def test_head_with_a_bias():
    model = build(CONFIGS["llama"], 9)
    bias = nn.Parameter(torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(10)))
    model.lm_head.bias = bias
    plan, tokens = random_plan(model, 11), draw(12)
    look = Probe(model, tokens)
    dense = copy.deepcopy(model)
    with nirvana.masked(model, plan):
        ours = look.divergence()
        kl, nll = exact(dense, model, tokens)
    assert (ours.kl, ours.nll) == pytest.approx((kl, nll), rel=2e-5)


def test_bfloat16_logits_are_not_rounded():
    """The hidden states are what a bf16 model computes; logits and KL from them are fp32."""
    model = build(CONFIGS["llama-tied"], 13).bfloat16()
    plan, tokens = random_plan(model, 14), draw(15)
    look = Probe(model, tokens)
    hidden = []
    with torch.no_grad(), nirvana.patching.forward_replaced(model.lm_head, lambda _: lambda h: hidden.append(h) or h):
        model(tokens)
        with nirvana.masked(model, plan):
            model(tokens)
            ours = look.divergence()
    weight = model.lm_head.weight.detach().double()
    log_p, log_q = (F.log_softmax(h[:, :-1].flatten(0, 1).double() @ weight.T, dim=-1) for h in hidden[:2])
    assert ours.kl == pytest.approx(F.kl_div(log_q, log_p, reduction="batchmean", log_target=True).item(), rel=2e-5)
    assert ours.nll == pytest.approx(F.nll_loss(log_q, tokens[:, 1:].flatten()).item(), rel=2e-6)


def test_hidden_states_are_kept_in_the_models_type_and_nothing_larger():
    model = build(CONFIGS["llama"], 16).bfloat16()
    look = Probe(model, draw(17))
    kept = sum(tensor.numel() * tensor.element_size() for tensor in look._dense)
    assert kept == 5 * 19 * model.config.hidden_size * 2


def test_the_model_is_left_as_it_was_found():
    model = build(CONFIGS["t5"], 18).train()
    model.encoder.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.config.dropout_rate = 0.5
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    look = Probe(model, draw(19))
    assert look.divergence().kl == pytest.approx(0, abs=1e-7)  # dropout would make it large
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "forward" not in vars(model.lm_head)


@pytest.mark.parametrize(
    ("tokens", "more", "message"),
    [
        (torch.zeros(0, 8, dtype=torch.int64), {}, "the probe is empty"),
        (torch.zeros(2, 1, dtype=torch.int64), {}, "at least 1 example of 2 tokens"),
        (torch.zeros(2, 8), {}, "give int64"),
        (torch.full((2, 8), VOCABULARY), {}, f"token id {VOCABULARY} is outside"),
        (torch.zeros(2, 8, dtype=torch.int64), {"micro_batch": 0}, "--micro-batch 0 must be at least 1"),
    ],
)
def test_bad_probes(tokens, more, message):
    with pytest.raises(NirvanaError, match=message):
        Probe(build(CONFIGS["llama"], 20), tokens, **more)


def test_a_model_that_is_not_finite_is_named():
    model = build(CONFIGS["llama"], 21)
    look = Probe(model, draw(22))
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(NirvanaError, match=r"model\.layers\.0\.mlp\.up_proj\.weight holds NaN"):
        look.divergence()


def test_another_vocabulary_is_refused():
    model = build(CONFIGS["llama"], 23)
    config = copy.deepcopy(CONFIGS["llama"])
    config.vocab_size = VOCABULARY + 1
    with pytest.raises(NirvanaError, match="vocabulary of 97, the model has 98"):
        Probe(model, draw(24)).divergence(build(config, 25))
