"""Layers on several devices, and how often a walk waits for one: on pretended devices."""

from __future__ import annotations

import copy

import accelerate
import families
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from pretended import PretendedDevices, move
from test_saliency import CONFIGS, build, draw_tokens
from test_saliency_masks import RIGHT

from nirvana import NirvanaError, describe, score
from nirvana.architectures.inputs import model_inputs
from nirvana.repair import repair
from nirvana.saliency import ntk_report
from nirvana.saliency.afr import weight_scores
from nirvana.selection.probe import Probe

pytestmark = pytest.mark.usefixtures("one_thread")

#: One of each kind: gradients, an example at a time, masks, activations with and without layers' angles, both of AFR.
CRITERIA = ("nirvana", "taylor2", "mask-fisher", "flap", "cfsp", "lorap", "afr-abs-gmm", "magnitude")

#: What goes to the second device: the last layers, and in a decoder what follows them (a tied head stays behind).
SECOND = {
    "llama": ("model.layers.1", "model.norm", "lm_head"),
    "llama-tied": ("model.layers.1", "model.norm"),
    "qwen3-biases": ("model.layers.1", "model.norm", "lm_head"),
    "t5": ("encoder.block.1", "decoder.block.1"),
    "t5-gated": ("encoder.block.1", "decoder.block.1", "decoder.final_layer_norm", "lm_head"),
}


class Follow(AlignDevicesHook):
    """accelerate's own hook, for a module that is in its place already."""

    def init_hook(self, module):
        return module


def divided(name, second=None, config=None):
    """A model on two devices, dispatched as ``device_map`` does it."""
    model = build(name, config=config)
    for part in SECOND[name] if second is None else second:
        move(model.get_submodule(part), "meta:1")
    move(model, "meta:0")
    for module in model.modules():
        places = {parameter.device for parameter in module.parameters()}
        if module is not model and len(places) == 1:
            add_hook_to_module(module, Follow(execution_device=places.pop()))
    add_hook_to_module(model, Follow(execution_device=torch.device("meta:0"), io_same_device=True))
    return model


def assert_equal(ours, expected):
    assert list(ours) == list(expected)
    for block, values in expected.items():
        assert type(ours[block]) is torch.Tensor
        assert ours[block].device.type == "cpu"
        assert torch.equal(ours[block], values), block


# ---- several devices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("llama", None),
        ("llama", RIGHT),
        ("llama-tied", None),
        ("qwen3-biases", RIGHT),
        ("t5", RIGHT),
        ("t5-gated", None),
    ],
    ids=lambda value: value if isinstance(value, str) else "whole" if value is None else "padded",
)
def test_layers_on_two_devices_get_the_scores_of_one(name, criterion, mask):
    tokens = draw_tokens(4, 12)
    options = {"criterion": criterion, "attention_mask": mask, "micro_batch": 3}
    with PretendedDevices():
        expected = score(divided(name, second=()), tokens, **options)
        ours = score(divided(name), tokens, **options)
    assert_equal(ours, expected)
    assert ours.settings == expected.settings
    # The CPU's own attention sums in another order.
    for block, values in score(build(name), tokens, **options).items():
        torch.testing.assert_close(ours[block], values, rtol=1e-3, atol=1e-4 * float(values.abs().max()))


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_block_that_is_divided_itself_is_scored(name):
    """Its matrices are on two devices."""
    second = {"llama": ("model.layers.0.mlp.up_proj",), "t5": ("encoder.block.0.layer.0.SelfAttention.v",)}[name]
    with PretendedDevices():
        for criterion in ("nirvana", "magnitude"):
            ours = score(_back(divided(name, second), second), draw_tokens(), criterion=criterion)
            assert_equal(ours, score(divided(name, ()), draw_tokens(), criterion=criterion))


def _back(model, second):
    """What the divided layer computes goes back to the first device."""
    for part in second:
        module = model.get_submodule(part)
        module.register_forward_hook(lambda module, inputs, output: output.to("meta:0"))
    return model


@pytest.mark.parametrize("name", ["llama", "t5-gated"])
def test_the_kernel_report_of_layers_on_two_devices(name):
    tokens = draw_tokens(3)
    plan = families.random_plan(build(name), 4)
    with PretendedDevices():
        assert ntk_report(divided(name), plan, tokens) == ntk_report(divided(name, ()), plan, tokens)


def test_probe_and_repair_of_layers_on_two_devices():
    tokens, found = draw_tokens(3), []
    plan = families.uniform_plan(build("llama"), 1, 5, seed=0)
    with PretendedDevices():
        for second in ((), SECOND["llama"]):
            model = divided("llama", second)
            probe = Probe(model, tokens, micro_batch=2)
            repair(model, plan, tokens)
            found.append(probe.divergence())
    assert found[0] == found[1]
    assert found[0].kl > 0


@pytest.mark.parametrize("criterion", ["nirvana", "mask-fisher", "flap", "magnitude"])
def test_offloaded_weights_are_refused(criterion):
    model = build("llama")
    accelerate.cpu_offload(model.model.layers[1], torch.device("cpu"))
    with pytest.raises(NirvanaError, match=r"parameter model\.layers\.1\.\S+ is offloaded .* device_map"):
        score(model, draw_tokens(), criterion=criterion)


# ---- waiting --------------------------------------------------------------------------------------------------------


def waits_of(run) -> int:
    PretendedDevices.waits.clear()
    with PretendedDevices():
        run()
    return PretendedDevices.waits.total()


def deep(name, layers):
    config = copy.deepcopy(CONFIGS[name])
    if config.is_encoder_decoder:
        config.num_layers = config.num_decoder_layers = layers
    else:
        config.num_hidden_layers = layers
    return divided(name, second=(), config=config)


#: Copies of the scores to the CPU, the flags of what is finite, and the layers' angles.
FEW = 4


@pytest.mark.parametrize("mask", [None, RIGHT], ids=["whole", "padded"])
@pytest.mark.parametrize("criterion", ["nirvana", "mask-abs", "taylor2", "llm-pruner-vector", "flap", "cfsp", "lorap"])
@pytest.mark.parametrize("name", ["llama-biases", "t5"])
def test_waits_grow_neither_with_layers_nor_with_passes(name, criterion, mask):
    """But for those of transformers, which asks about the mask at the start of each forward pass."""
    tokens = draw_tokens(4, 12)
    inputs = model_inputs(build(name), tokens, mask).arguments
    for layers, micro_batch in ((2, 4), (2, 1), (5, 2)):
        model = deep(name, layers)
        theirs = waits_of(lambda model=model: model(**{k: _there(v) for k, v in inputs.items()}))
        options = {"criterion": criterion, "attention_mask": mask, "micro_batch": micro_batch}
        waits = waits_of(lambda model=model, options=options: score(model, tokens, **options))
        passes = 4 if criterion == "taylor2" else 4 // micro_batch
        assert 0 < waits - passes * theirs <= FEW, (layers, micro_batch)


def _there(value):
    return value.to("meta:0") if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("objective", ["max-logit", "nll"])
def test_the_objectives_do_not_wait(objective, monkeypatch):
    """Nor for each chunk of the vocabulary."""
    monkeypatch.setattr("nirvana.ops.head.chunk_elements", lambda device: 4 * 12 * 5)
    model, tokens = deep("qwen3-biases", 2), draw_tokens(4, 12)
    theirs = waits_of(lambda: model(input_ids=_there(tokens), use_cache=False))
    assert 0 < waits_of(lambda: score(model, tokens, objective=objective)) - theirs <= FEW


def test_afr_waits_in_its_decompositions_alone():
    """torch asks whether each succeeded: one an example and layer."""
    tokens, waits = draw_tokens(4, 12), []
    for layers, micro_batch in ((2, 4), (2, 1), (5, 2)):
        model = deep("llama", layers)
        theirs = waits_of(lambda model=model: model(input_ids=_there(tokens), use_cache=False))
        waits.append(
            waits_of(lambda model=model, n=micro_batch: score(model, tokens, criterion="afr-abs", micro_batch=n))
        )
        assert 0 < waits[-1] - 2 * (4 // micro_batch) * theirs <= FEW  # eigh itself asks inside, where it is not seen


# ---- what is not finite ---------------------------------------------------------------------------------------------


def message(run) -> str:
    with pytest.raises(NirvanaError) as caught:
        run()
    return str(caught.value)


def broken(kind):
    """A model that is finite no more, on the CPU."""
    model = build("llama-biases")
    with torch.no_grad():
        if kind == "weight":
            model.model.layers[1].mlp.up_proj.weight[2, 3] = float("nan")
        elif kind == "head":
            model.lm_head.weight.fill_(3e38)
        elif kind == "output":
            model = model.to(torch.float16)
            for layer in model.model.layers:
                layer.mlp.down_proj.weight.fill_(6e4)
                layer.mlp.up_proj.weight.fill_(6e4)
        elif kind == "late":
            model.model.layers[0].mlp.down_proj.weight.fill_(1e38)
    return model


@pytest.mark.parametrize("kind", ["weight", "head", "output", "late"])
@pytest.mark.parametrize("criterion", ["nirvana", "taylor2", "mask-fisher", "flap", "afr-abs", "magnitude"])
def test_what_is_not_finite_is_named_as_on_the_cpu(kind, criterion):
    """There each tensor is looked at as soon as it exists; a device is asked once, and then walked again to search."""
    calls = []
    model = broken(kind)

    def run(progress=lambda: None):
        return score(model, draw_tokens(), criterion=criterion, progress=progress, micro_batch=2)

    try:
        expected = run()
    except NirvanaError as error:
        expected = str(error)
    move(model, "meta:0")
    with PretendedDevices():
        if isinstance(expected, str):
            assert message(lambda: run(lambda: calls.append(0))) == expected
        else:
            assert set(run(lambda: calls.append(0))) == set(expected)
    assert len(calls) <= 2 * (4 + 3 + 3 + 2), "the search is no progress"


def test_unstructured_scores_are_handed_on_once():
    """Also where a second walk searches for what was not finite."""
    model, names = broken("late"), []
    move(model, "meta:0")
    with PretendedDevices():
        found = message(
            lambda: weight_scores(model, describe(model), draw_tokens(), lambda name, part, scores: names.append(name))
        )
    assert "NaN or infinity" in found or "overflows" in found
    assert len(names) == len(set(names))
