"""nirvana.load(base, plan=...): the checkpoint that `apply` would write, without writing it, and in less memory."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from families import ALL, CONFIGS, build, inputs, logits, random_plan, uniform_plan
from transformers import AutoConfig, GenerationConfig

import nirvana
from nirvana import NirvanaError
from nirvana.allocation import make_plan
from nirvana.checkpoint.tensors import CheckpointTensors
from nirvana.demo import demo_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ALL)
def test_it_is_the_checkpoint_that_apply_writes(tmp_path, name):
    base = build(CONFIGS[name], seed=0)
    base.save_pretrained(tmp_path / "base")
    plan = random_plan(base, seed=0)
    nirvana.apply_checkpoint(tmp_path / "base", plan, tmp_path / "small")
    before = sorted(tmp_path.rglob("*"))
    small, expected = nirvana.load(tmp_path / "base", plan=plan), nirvana.load(tmp_path / "small")
    assert sorted(tmp_path.rglob("*")) == before
    assert type(small) is type(expected)
    assert not small.training
    assert small.generation_config.to_dict() == expected.generation_config.to_dict()
    assert_equal_states(small, expected)
    arguments = inputs(expected, seed=0)
    assert torch.equal(logits(small, arguments), logits(expected, arguments))
    small.save_pretrained(tmp_path / "saved")
    expected.save_pretrained(tmp_path / "expected")
    assert config_json(tmp_path / "saved") == config_json(tmp_path / "expected")


def assert_equal_states(model, expected):
    mine, others = model.state_dict(), expected.state_dict()
    assert mine.keys() == others.keys()
    for key, tensor in mine.items():
        assert torch.equal(tensor, others[key]), key
        assert tensor.dtype == others[key].dtype, key


def config_json(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture
def base(tmp_path) -> Path:
    """A Llama checkpoint in two files, with generation defaults of its own."""
    model = build(CONFIGS["llama"], seed=1)
    model.save_pretrained(tmp_path / "base", max_shard_size="80KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    GenerationConfig(max_new_tokens=7, do_sample=True).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_plan_may_be_a_file_and_shards_are_read(base, tmp_path):
    plan = random_plan(build(CONFIGS["llama"], seed=1), seed=2)
    plan.save(tmp_path / "plan.json")
    nirvana.apply_checkpoint(base, plan, tmp_path / "small")
    small = nirvana.load(base, plan=tmp_path / "plan.json")
    assert_equal_states(small, nirvana.load(tmp_path / "small"))
    assert small.generation_config.max_new_tokens == 7


def test_equal_widths_make_the_stock_class(base):
    plan = uniform_plan(build(CONFIGS["llama"], seed=1), groups=2, neurons=16, seed=0)
    assert type(nirvana.load(base, plan=plan)).__name__ == "LlamaForCausalLM"


def test_other_type(base):
    plan = random_plan(build(CONFIGS["llama"], seed=1), seed=2)
    small = nirvana.load(base, plan=plan, dtype="bfloat16")
    assert {p.dtype for p in small.parameters()} == {torch.bfloat16}
    assert small.config.dtype == torch.bfloat16


def test_result_can_be_trained_and_owns_its_memory(base):
    """Also within inference mode; and the base may be replaced on disk while the model lives."""
    plan = random_plan(build(CONFIGS["llama"], seed=1), seed=2)
    with torch.inference_mode():
        small = nirvana.load(base, plan=plan)
    expected = {name: parameter.detach().clone() for name, parameter in small.named_parameters()}
    for file in base.glob("*.safetensors"):
        with open(file, "r+b") as stream:
            stream.seek(4096)
            stream.write(b"\xff" * 4096)
    assert all(torch.equal(parameter, expected[name]) for name, parameter in small.named_parameters())
    small(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    assert all(parameter.grad is not None for parameter in small.parameters())


def test_one_dense_tensor_at_a_time(base, monkeypatch):
    plan = random_plan(build(CONFIGS["llama"], seed=1), seed=2)
    seen: list[weakref.ref] = []
    load = CheckpointTensors.load

    def watched(self, name):
        assert not [ref for ref in seen if ref() is not None]
        tensor = load(self, name)
        seen.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(CheckpointTensors, "load", watched)
    small = nirvana.load(base, plan=plan)
    assert len(seen) == len(small.state_dict())


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of the resident set from /proc")
def test_memory_grows_by_the_smaller_model_only(tmp_path):
    """Of the demo model, mapped pages of its weight file included."""
    demo = demo_checkpoint()
    architecture = nirvana.describe(AutoConfig.from_pretrained(demo))
    kept = {block.name: tuple(range(0, block.size, 2)) for block in architecture.blocks}
    make_plan(architecture, kept, {}).save(tmp_path / "plan.json")
    program = """
import sys, json, nirvana
from nirvana.evaluation.memory import _reset_resident_peak, resident_peak
_reset_resident_peak()
before = resident_peak()
model = nirvana.load(sys.argv[1], plan=sys.argv[2])
print(json.dumps([resident_peak() - before, sum(p.nbytes for p in model.parameters())]))
"""
    run = subprocess.run(
        [sys.executable, "-c", program, demo, tmp_path / "plan.json"], capture_output=True, text=True, check=True
    )
    growth, size = json.loads(run.stdout.splitlines()[-1])
    dense = (demo / "model.safetensors").stat().st_size
    assert size < 0.7 * dense
    assert growth < size + 0.1 * dense


def test_refusals_name_the_fault(base, tmp_path, llama_folder):
    plan = random_plan(build(CONFIGS["llama"], seed=1), seed=2)
    with pytest.raises(NirvanaError, match=r"no plan at .*missing\.json"):
        nirvana.load(base, plan=tmp_path / "missing.json")
    with pytest.raises(NirvanaError, match=r"model\.layers\.0\.mlp"):
        nirvana.load(llama_folder, plan=plan)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(NirvanaError, match="nirvana apply"):
        nirvana.load(tmp_path / "model.gguf", plan=plan)
    with pytest.raises(NirvanaError, match="--dtype 'int3'"):
        nirvana.load(base, plan=plan, dtype="int3")
