"""Rotary embeddings of every kind, unequal widths: some ask the configuration for what layers differ in."""

from __future__ import annotations

import copy

import pytest
import torch
from families import CONFIGS, build, inputs, logits, random_plan

import nirvana

SCALINGS = (
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
)


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling["rope_type"])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3-tied"])
def test_what_is_read_back_computes_the_masked_model(tmp_path, name, scaling):
    config = copy.deepcopy(CONFIGS[name])
    config.rope_parameters = {"rope_theta": 10000.0, **scaling}
    model = build(config, seed=0)
    model.save_pretrained(tmp_path / "base")
    plan = random_plan(model, seed=0)
    nirvana.apply_checkpoint(tmp_path / "base", plan, tmp_path / "small")
    small = nirvana.load(tmp_path / "small")
    arguments = inputs(small, seed=0)
    with nirvana.masked(model, plan):
        expected = logits(model, arguments)
    torch.testing.assert_close(logits(small, arguments), expected, rtol=0, atol=1e-5)
