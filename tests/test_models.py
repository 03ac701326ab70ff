"""Where weights are loaded to."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from transformers import LlamaForCausalLM

from nirvana import models

META = torch.device("meta")


@pytest.fixture
def asked():
    """The options that transformers was given; it does what it was asked to."""
    with mock.patch.object(LlamaForCausalLM, "from_pretrained", wraps=LlamaForCausalLM.from_pretrained) as call:
        yield lambda: call.call_args.kwargs


def test_weights_for_the_cpu_are_loaded_there(llama_folder, asked):
    model = models.resolve(llama_folder).model(device="cpu")
    assert "device_map" not in asked()
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert not model.training


@pytest.mark.parametrize("accelerate", [True, False])
def test_weights_for_another_device_go_straight_there(llama_folder, asked, monkeypatch, accelerate):
    """The meta device stands for it: what is loaded there has no numbers, but a place."""
    monkeypatch.setattr(models, "resolve_device", lambda device: META)
    monkeypatch.setattr(models, "is_accelerate_available", lambda: accelerate)
    model = models.resolve(llama_folder).model(device="cuda")
    assert asked().get("device_map") == ({"": META} if accelerate else None)
    assert {tensor.device for tensor in model.parameters()} == {META}
    assert not model.training
    assert not hasattr(model, "_hf_hook"), "one device needs no hooks"
