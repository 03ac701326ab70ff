"""Layers that keep their activations and layers that run again: the same bits, and who is which."""

from __future__ import annotations

import copy

import pytest
import torch
from test_saliency import CONFIGS, PeakBytes, build, draw_tokens, state_of, used_model
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from nirvana import score
from nirvana.ops.head import workspace_bytes
from nirvana.saliency.afr import score_forms

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def runs_of(model, run) -> list[int]:
    """How often each layer ran."""
    counts = {}
    handles = [
        # An attention's forward runs again with its layer; a hook on the layer itself would not.
        next(m for m in layer.modules() if isinstance(m, nn.Linear)).register_forward_pre_hook(
            lambda module, inputs, layer=layer: counts.update({layer: counts.get(layer, 0) + 1})
        )
        for layer in model.modules()
        if isinstance(layer, GradientCheckpointingLayer)
    ]
    run()
    for handle in handles:
        handle.remove()
    return list(counts.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("criterion", ["nirvana", "taylor2", "mask-fisher", "afr-abs"])
@pytest.mark.parametrize("name", ["llama-biases", "qwen3", "t5-gated"])
def test_the_same_bits_either_way(name, criterion, dtype):
    model, tokens = build(name).to(dtype), draw_tokens()
    options = {"criterion": criterion, "micro_batch": 3}
    kept = score(model, tokens, gradient_checkpointing=False, **options)
    again = score(model, tokens, gradient_checkpointing=True, **options)
    decided = score(model, tokens, **options)
    for block, values in kept.items():
        assert torch.equal(again[block], values)
        assert torch.equal(decided[block], values)


@pytest.mark.parametrize(
    ("criterion", "choice", "times"),
    [
        ("nirvana", True, 2),
        ("nirvana", False, 1),
        ("nirvana", None, 2),
        ("mask-fisher", True, 2),
        ("mask-fisher", False, 1),
        ("mask-fisher", None, 1),
    ],
)
def test_who_runs_again_on_a_cpu(criterion, choice, times):
    model = build("llama")
    found = runs_of(model, lambda: score(model, draw_tokens(), criterion=criterion, gradient_checkpointing=choice))
    assert found == [times, times]


def test_all_parts_of_a_sum_and_all_forms_take_the_choice():
    model = build("llama")
    for choice, times in ((True, 2), (False, 1)):
        options = {"gradient_checkpointing": choice}
        run = lambda options=options: score(model, draw_tokens(), criterion="nirvana+taylor2", **options)  # noqa: E731
        assert runs_of(model, run) == [times * 6] * 2  # five examples
        run = lambda options=options: score_forms(model, draw_tokens(), **options)  # noqa: E731
        assert runs_of(model, run) == [times * 2] * 2


# ---- by free memory -------------------------------------------------------------------------------------------------


def deep(name, layers):
    config = copy.deepcopy(CONFIGS[name])
    if config.is_encoder_decoder:
        config.num_layers = config.num_decoder_layers = layers
    else:
        config.num_hidden_layers = layers
    return build("", config=config)


@pytest.fixture
def free(monkeypatch):
    """Sets the bytes that a device is said to have free, besides the chunks of the head."""

    def set_to(size: int) -> None:
        monkeypatch.setattr("nirvana.saliency.checkpointing.free_bytes", lambda device: size + workspace_bytes(CPU))

    return set_to


@pytest.mark.parametrize("criterion", ["nirvana", "mask-abs"])
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_as_many_layers_keep_activations_as_fit(name, criterion, free):
    model, tokens = deep(name, 6), draw_tokens(4, 12)
    whole = score(model, tokens, criterion=criterion)
    kept = []
    for size in (0, 2**18, 2**19, 2**20, 2**30):
        free(size)
        found = {}
        runs = runs_of(
            model, lambda found=found: found.update(score(model, tokens, criterion=criterion, micro_batch=4))
        )
        assert all(torch.equal(found[block], whole[block]) for block in whole)
        kept.append(runs.count(1))
        # What fits is given to the layers that run first.
        assert runs == sorted(runs)
    assert kept[0] == 0
    assert kept[-1] == len(runs)
    assert kept == sorted(kept)
    assert set(kept) - {0, len(runs)}, "some sizes must have room for a part"


def test_what_is_counted_is_what_exists(free):
    """The peak of all that a walk makes stays within the free memory that it was told of, and makes use of it."""
    model, tokens = deep("llama", 10), draw_tokens(8, 48)
    peaks = {}
    for size in (0, 2**21, 2**22, 2**30):
        free(size)
        with PeakBytes(model) as seen:
            score(model, tokens, objective="nll")
        peaks[size] = seen.peak
    assert peaks[0] < peaks[2**21] < peaks[2**22] < peaks[2**30]
    for size in (2**21, 2**22):
        assert size / 2 < peaks[size] <= size


def test_micro_batches_decide_once_and_leave_room_for_their_sums(free):
    """Two passes of two examples keep the activations of fewer layers than one pass of two."""
    free(2**17)
    model, tokens = deep("llama", 4), draw_tokens(4, 12)
    assert runs_of(model, lambda: score(model, tokens[:2])) == [1, 1, 2, 2]
    assert runs_of(model, lambda: score(model, tokens, micro_batch=2)) == [2, 4, 4, 4]


def test_nothing_of_a_pass_outlives_it(free):
    """What counts saved tensors must not keep them."""
    free(2**30)
    model, tokens = build("llama"), draw_tokens()
    with PeakBytes(model) as seen:
        score(model, tokens)
        model(tokens[:1, :2])
    assert sum(size for reference, size in seen.alive.values() if not reference.expired()) < 2**16


@pytest.mark.parametrize("choice", [True, False, None])
def test_the_model_is_left_as_found(choice, free):
    free(2**19)
    model = used_model("llama-biases")
    before = state_of(model)
    score(model, draw_tokens(), gradient_checkpointing=choice)
    after = state_of(model)
    for key in before:
        assert after[key] == before[key], key
