"""Slicing in memory: the smaller model computes what the masked one does, and leaves the input model alone."""

from __future__ import annotations

import copy

import pytest
import torch
from families import ALL, CONFIGS, build, inputs, logits, random_plan, uniform_plan
from torch import nn

import nirvana
from nirvana import NirvanaError, PruningPlan
from nirvana.allocation import make_plan

pytestmark = pytest.mark.usefixtures("one_thread")


#: One family with unequal widths of each kind: a decoder and an encoder-decoder.
PRUNED = ("llama-biases", "t5-gated")


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ALL)
def test_sliced_equals_masked(name, seed):
    model = build(CONFIGS[name], seed)
    plan = random_plan(model, seed)
    arguments = inputs(model, seed)
    with nirvana.masked(model, plan):
        masked = logits(model, arguments)
    sliced = logits(nirvana.apply(model, plan), arguments)
    torch.testing.assert_close(sliced, masked, rtol=0, atol=1e-5)
    # Else equality would say nothing: the removed units matter.
    assert (masked - logits(model, arguments)).abs().max() > 0.5


@pytest.mark.parametrize("name", ["llama-biases", "mistral", "qwen2", "qwen3", "t5", "t5-gated"])
def test_uniform_sliced_equals_masked(name):
    model = build(CONFIGS[name], seed=2)
    plan = uniform_plan(model, groups=2, neurons=11, seed=2)
    arguments = inputs(model, seed=2)
    with nirvana.masked(model, plan):
        masked = logits(model, arguments)
    torch.testing.assert_close(logits(nirvana.apply(model, plan), arguments), masked, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_plan_that_keeps_everything_changes_no_bit(name):
    model = build(CONFIGS[name], seed=3)
    architecture = nirvana.describe(model)
    plan = make_plan(architecture, {b.name: tuple(range(b.size)) for b in architecture.blocks}, {})
    small = nirvana.apply(model, plan)
    assert type(small) is type(model)
    arguments = inputs(model, seed=3)
    assert torch.equal(logits(small, arguments), logits(model, arguments))


@pytest.mark.parametrize("name", ALL)
def test_input_model_is_untouched(name):
    model = build(CONFIGS[name], seed=4).train()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    config = copy.deepcopy(model.config.to_dict())
    small = nirvana.apply(model, random_plan(model, seed=4))
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[key], state[key]) for key in state)
    assert model.config.to_dict() == config
    assert model.training
    assert not small.training
    assert _storages(small).isdisjoint(_storages(model))


def _storages(model: nn.Module) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}


@pytest.mark.parametrize("name", ALL)
def test_parameter_count_is_the_plans(name):
    model = build(CONFIGS[name], seed=5)
    plan = random_plan(model, seed=5)
    small = nirvana.apply(model, plan)
    assert plan.totals["parameters_before"] == sum(p.numel() for p in model.parameters())
    assert plan.totals["parameters_after"] == sum(p.numel() for p in small.parameters())
    again = random_plan(small, seed=6)
    assert again.totals["parameters_before"] == plan.totals["parameters_after"]
    assert again.totals["parameters_after"] == sum(p.numel() for p in nirvana.apply(small, again).parameters())


@pytest.mark.parametrize("name", ALL)
def test_prunable_parameters_are_those_that_go(name):
    """Without biases and position-bias tables, what the plan removes is what the model loses."""
    model = build(CONFIGS[name], seed=6)
    plan = random_plan(model, seed=6)
    small = nirvana.apply(model, plan)
    before, after = _matrix_parameters(model), _matrix_parameters(small)
    assert plan.totals["prunable_before"] - plan.totals["prunable_after"] == before - after


def _matrix_parameters(model: nn.Module) -> int:
    parameters = model.named_parameters()
    return sum(p.numel() for name, p in parameters if p.dim() == 2 and "relative_attention_bias" not in name)


@pytest.mark.parametrize("name", ALL)
def test_all_tensors_are_contiguous(name):
    model = build(CONFIGS[name], seed=7)
    small = nirvana.apply(model, random_plan(model, seed=7))
    assert all(tensor.is_contiguous() for tensor in [*small.parameters(), *small.buffers()])


@pytest.mark.parametrize("name", ["llama-tied", "qwen2-tied", "qwen3-tied", "t5"])
def test_tied_head_stays_tied(name):
    model = build(CONFIGS[name], seed=8)
    small = nirvana.apply(model, random_plan(model, seed=8))
    assert small.get_output_embeddings().weight is small.get_input_embeddings().weight


def test_own_head_of_t5_stays_apart():
    model = build(CONFIGS["t5-gated"], seed=9)
    small = nirvana.apply(model, random_plan(model, seed=9))
    assert torch.equal(small.lm_head.weight, model.lm_head.weight)
    assert torch.equal(small.shared.weight, model.shared.weight)
    assert not torch.equal(small.lm_head.weight, small.shared.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PRUNED)
def test_half_precision_is_kept_bit_for_bit(name, dtype):
    model = build(CONFIGS[name], seed=10).to(dtype)
    plan = random_plan(model, seed=10)
    small = nirvana.apply(model, plan)
    assert small.dtype == dtype
    wide = nirvana.apply(build(CONFIGS[name], seed=10), plan)
    for (key, tensor), expected in zip(small.named_parameters(), wide.parameters(), strict=True):
        # transformers itself keeps T5's `wo` in fp32 when a float16 model is opened.
        if not (dtype == torch.float16 and ".wo." in key):
            assert tensor.dtype == dtype, key
        assert torch.equal(tensor.to(dtype), expected.to(dtype)), key


@pytest.mark.parametrize("name", ALL)
def test_pruning_again_equals_masking(name):
    model = build(CONFIGS[name], seed=11)
    once = nirvana.apply(model, random_plan(model, seed=11))
    plan = random_plan(once, seed=12)
    twice = nirvana.apply(once, plan)
    arguments = inputs(model, seed=11)
    with nirvana.masked(once, plan):
        masked = logits(once, arguments)
    torch.testing.assert_close(logits(twice, arguments), masked, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_pruning_twice_equals_pruning_once(name):
    model = build(CONFIGS[name], seed=13)
    first = random_plan(model, seed=13)
    once = nirvana.apply(model, first)
    second = random_plan(once, seed=14)
    kept = {block: tuple(first.kept[block][i] for i in units) for block, units in second.kept.items()}
    both = nirvana.apply(model, make_plan(nirvana.describe(model), kept, {}))
    twice = nirvana.apply(once, second).state_dict()
    expected = both.state_dict()
    assert all(torch.equal(twice[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["llama-head-dim", "qwen3"])
def test_unequal_model_pruned_to_equal_widths_is_stock_again(name):
    model = build(CONFIGS[name], seed=15)
    architecture = nirvana.describe(model)
    kept = {b.name: tuple(range(b.size - i % 2)) for i, b in enumerate(architecture.blocks)}
    kept["model.layers.0.mlp"] = tuple(range(20))
    once = nirvana.apply(model, make_plan(architecture, kept, {}))
    assert once.config.model_type.startswith("pruned_")
    plan = uniform_plan(once, groups=2, neurons=16, seed=15)
    stock = nirvana.apply(once, plan)
    assert type(stock) is type(model)
    arguments = inputs(model, seed=15)
    with nirvana.masked(once, plan):
        masked = logits(once, arguments)
    torch.testing.assert_close(logits(stock, arguments), masked, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_finetuning_step_changes_only_the_small_model(name):
    model = build(CONFIGS[name], seed=16)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    small = nirvana.apply(model, random_plan(model, seed=16)).train()
    start = {key: tensor.clone() for key, tensor in small.named_parameters()}
    arguments = inputs(small, seed=16)
    labels = arguments.pop("decoder_input_ids", arguments["input_ids"])
    optimizer = torch.optim.AdamW(small.parameters(), lr=1e-3)
    small(**arguments, labels=labels).loss.backward()
    optimizer.step()
    unchanged = [key for key, tensor in small.named_parameters() if torch.equal(tensor, start[key])]
    assert unchanged == []
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", PRUNED)
def test_gradient_checkpointing_gives_the_same_gradients(name):
    model = build(CONFIGS[name], seed=17)
    small = nirvana.apply(model, random_plan(model, seed=17))
    small.train()
    arguments = inputs(small, seed=17)
    labels = arguments.pop("decoder_input_ids", arguments["input_ids"])
    small(**arguments, labels=labels).loss.backward()
    plain = {key: tensor.grad.clone() for key, tensor in small.named_parameters()}
    small.zero_grad()
    small.gradient_checkpointing_enable()
    small(**arguments, labels=labels).loss.backward()
    for key, tensor in small.named_parameters():
        torch.testing.assert_close(tensor.grad, plain[key], rtol=1e-5, atol=1e-7, msg=key)


def _edited(plan: PruningPlan, block: str, **changes) -> PruningPlan:
    """`plan` with one of its blocks changed (dropped when there are no changes)."""
    data = {**plan.__dict__, "format": "nirvana-plan", "version": 1}
    data["blocks"] = [{**b.__dict__, "kept": list(b.kept)} for b in plan.blocks if b.name != block or changes]
    for entry in data["blocks"]:
        if entry["name"] == block:
            entry.update(changes)
    return PruningPlan.from_dict(data)


@pytest.mark.parametrize(
    ("block", "changes", "message"),
    [
        ("model.layers.1.mlp", {"size": 36}, r"block model\.layers\.1\.mlp.*36 units.*37"),
        ("model.layers.2.self_attn", {"size": 9}, r"block model\.layers\.2\.self_attn.*9 units.*has 4"),
        ("model.layers.2.self_attn", {"unit": "neuron"}, r"block model\.layers\.2\.self_attn.*kind neuron"),
        ("model.layers.0.mlp", {"name": "model.layers.7.mlp"}, r"block model\.layers\.7\.mlp does not exist"),
        ("model.layers.1.self_attn", {}, r"nothing about block model\.layers\.1\.self_attn"),
    ],
    ids=["neurons", "groups", "kind", "unknown", "missing"],
)
def test_plan_that_does_not_fit_names_the_block(block, changes, message):
    model = build(CONFIGS["llama"], seed=18)
    architecture = nirvana.describe(model)
    whole = make_plan(architecture, {b.name: (0,) for b in architecture.blocks}, {})
    plan = _edited(whole, block, **changes)
    with pytest.raises(NirvanaError, match=message):
        nirvana.apply(model, plan)
    with pytest.raises(NirvanaError, match=message), nirvana.masked(model, plan):
        pass


def test_plan_for_another_family_is_refused():
    plan = random_plan(build(CONFIGS["qwen3"], seed=19), seed=19)
    with pytest.raises(NirvanaError, match=r"family 'qwen3'.*'llama'"):
        nirvana.apply(build(CONFIGS["llama"], seed=19), plan)


def test_plan_for_another_size_of_the_same_family_is_refused():
    plan = random_plan(build(CONFIGS["llama-biases"], seed=20), seed=20)
    with pytest.raises(NirvanaError, match=r"block model\.layers\.0\.mlp.*53 units.*37"):
        nirvana.apply(build(CONFIGS["llama"], seed=20), plan)


def test_plan_for_another_hidden_size_is_refused():
    """Heads and neurons agree in every block, yet it is another model."""
    config = copy.deepcopy(CONFIGS["llama"])
    config.hidden_size = 96
    plan = random_plan(build(CONFIGS["llama"], seed=20), seed=20)
    with pytest.raises(NirvanaError, match=r"prunable|shape|hidden"):
        nirvana.apply(build(config, seed=20), plan)


def test_weight_that_contradicts_the_configuration_names_block_and_tensor():
    model = build(CONFIGS["llama"], seed=21)
    plan = random_plan(model, seed=21)
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.zeros(36, 48))
    with pytest.raises(NirvanaError, match=r"block model\.layers\.1\.mlp: .*up_proj\.weight has shape \[36, 48\]"):
        nirvana.apply(model, plan)


def test_model_without_a_head_is_refused():
    model = build(CONFIGS["llama"], seed=22)
    with pytest.raises(NirvanaError, match=r"LlamaModel.*LlamaForCausalLM"):
        nirvana.apply(model.model, random_plan(model, seed=22))


def test_masking_ends_with_the_block():
    model = build(CONFIGS["llama"], seed=23)
    arguments = inputs(model, seed=23)
    dense = logits(model, arguments)
    with nirvana.masked(model, random_plan(model, seed=23)):
        assert not torch.equal(logits(model, arguments), dense)
    assert torch.equal(logits(model, arguments), dense)
