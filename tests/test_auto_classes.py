"""After `import nirvana` every Auto class opens a pruned checkpoint, and plans count what is really there."""

import pytest
import torch
from families import CONFIGS, build, inputs, random_plan
from transformers import AutoModel

import nirvana
from nirvana.allocation import make_plan

NAMES = ["llama", "mistral", "qwen2", "qwen3", "t5", "t5-gated"]


@pytest.mark.parametrize("name", NAMES)
def test_auto_model_opens_the_backbone(name, tmp_path):
    model = build(CONFIGS[name], seed=1)
    small = nirvana.apply(model, random_plan(model, seed=1))
    small.save_pretrained(tmp_path)
    backbone = AutoModel.from_pretrained(tmp_path)
    assert backbone.config.model_type == f"pruned_{model.config.model_type}"
    theirs = dict(backbone.named_parameters())
    mine = dict(small.named_parameters())
    assert theirs
    for key, value in theirs.items():
        assert torch.equal(value, mine[key] if key in mine else mine[f"model.{key}"])


@pytest.mark.parametrize("name", NAMES)
def test_totals_from_the_configuration_alone_are_those_of_the_model(name):
    model = build(CONFIGS[name], seed=2)
    plan = random_plan(model, seed=2)
    from_config = make_plan(nirvana.describe(model.config), plan.kept, {})
    assert from_config.totals == plan.totals


def test_a_model_sliced_in_inference_mode_can_be_trained():
    model = build(CONFIGS["llama"], seed=3)
    with torch.inference_mode():
        small = nirvana.apply(model, random_plan(model, seed=3))
    small(**inputs(small, seed=3)).logits.sum().backward()
    assert all(p.grad is not None for p in small.model.layers[0].parameters())
