"""vLLM runs what nirvana writes, and prunes while it loads: small random models of every decoder family."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from families import LLAMA3_ROPE, build, random_plan, uniform_plan
from families import _decoder as decoder
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config, Qwen3Config
from vllm_engine import CACHE_BYTES, answers, ask, cache_shapes, class_name, expected_answers

import nirvana
from nirvana import NirvanaError, PruningPlan
from nirvana.allocation import make_plan

#: vLLM's CPU attention wants 32 channels a head or a multiple.
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": decoder(LlamaConfig, 96, 12, 4, 96, head_dim=32, rope_parameters=LLAMA3_ROPE),
    "llama-biases": decoder(LlamaConfig, 128, 4, 4, 96, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama-parallel": decoder(LlamaConfig, 96, 8, 4, 96, head_dim=32),
    "mistral": decoder(MistralConfig, 96, 9, 3, 96, head_dim=32, sliding_window=8),
    "qwen2": decoder(Qwen2Config, 128, 4, 4, 96),
    "qwen2-windows": decoder(
        Qwen2Config, 128, 4, 4, 96, use_sliding_window=True, sliding_window=8, max_window_layers=1
    ),
    "qwen3": decoder(Qwen3Config, 96, 12, 4, 96, head_dim=32),
    "qwen3-tied": decoder(Qwen3Config, 96, 12, 4, 96, head_dim=32, tie_word_embeddings=True),
    "qwen3-windows": decoder(
        Qwen3Config, 96, 6, 3, 96, head_dim=32, use_sliding_window=True, sliding_window=8, max_window_layers=2
    ),
}


@dataclass(frozen=True)
class Case:
    """A dense checkpoint, a plan with unequal widths, and the checkpoint that it leaves."""

    dense: Path
    plan: PruningPlan
    plan_file: Path
    small: Path

    @property
    def load_time(self) -> dict:
        """Settings with which vLLM prunes the dense checkpoint while it loads."""
        return {"config_format": "nirvana", "hf_overrides": {"nirvana_plan": str(self.plan_file)}}


def make_case(folder: Path, name: str, plan_of=lambda model: random_plan(model, seed=0)) -> Case:
    model = build(CONFIGS[name], seed=0)
    model.save_pretrained(folder / "dense")
    plan = plan_of(model)
    plan.save(folder / "plan.json")
    nirvana.apply_checkpoint(folder / "dense", plan, folder / "small")
    return Case(folder / "dense", plan, folder / "plan.json", folder / "small")


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "llama-parallel"])
def test_unequal_layers(tmp_path, name):
    """The checkpoint, without trust_remote_code, and the dense weights with the plan: transformers' own answers."""
    case = make_case(tmp_path, name)
    runner, (tokens, scores) = ask(case.small, class_name, answers)
    family = json.loads((case.small / "config.json").read_text())["architectures"][0]
    assert runner == f"nirvana.serving.vllm.models.{family}"
    expected_tokens, expected_scores = expected_answers(nirvana.load(case.small))
    assert tokens == expected_tokens
    torch.testing.assert_close(scores, expected_scores, rtol=0, atol=1e-5)
    [(pruned_tokens, pruned_scores)] = ask(case.dense, answers, **case.load_time)
    assert pruned_tokens == tokens
    assert torch.equal(pruned_scores, scores)


@pytest.mark.parametrize(("name", "groups"), [("llama", 2), ("llama", 3), ("qwen2", 3), ("qwen3", 3)])
def test_equal_layers_pruned_at_load(tmp_path, name, groups):
    """Stock configurations: also where heads do not fill the hidden size, which vLLM's Qwen2 takes for granted."""
    case = make_case(tmp_path, name, lambda model: uniform_plan(model, groups, neurons=64, seed=0))
    [(tokens, scores)] = ask(case.dense, answers, **case.load_time)
    expected_tokens, expected_scores = expected_answers(nirvana.load(case.small))
    assert tokens == expected_tokens
    torch.testing.assert_close(scores, expected_scores, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "groups", "kind"),
    [
        ("llama", 2, "llama"),
        ("llama", 3, "mistral"),  # 9 heads do not divide the hidden size of 96 in LlamaConfig's way
        ("mistral", 2, "mistral"),
        ("qwen2", 3, "seed_oss"),  # vLLM's own Qwen2 takes head_dim to be hidden_size / heads
        ("qwen3", 3, "qwen3"),
        ("qwen3-tied", 3, "qwen3"),
    ],
)
def test_equal_layers_are_a_stock_checkpoint(tmp_path, name, groups, kind):
    case = make_case(tmp_path, name, lambda model: uniform_plan(model, groups, neurons=64, seed=0))
    assert json.loads((case.small / "config.json").read_text())["model_type"] == kind
    # Before vLLM, whose Transformers backend (it runs Seed-OSS there) replaces classes of transformers in this process.
    expected_tokens, expected_scores = expected_answers(nirvana.load(case.small))
    runner, (tokens, scores) = ask(case.small, class_name, answers)
    assert runner.startswith("vllm.model_executor.models.")
    assert tokens == expected_tokens
    torch.testing.assert_close(scores, expected_scores, rtol=0, atol=1e-5)


def test_cache_has_the_heads_that_each_layer_kept(tmp_path):
    """No padding: the same bytes hold as many more blocks as there are fewer key/value heads."""
    case = make_case(tmp_path, "llama")
    kept = [len(units) for block, units in case.plan.kept.items() if block.endswith("self_attn")]
    assert len(set(kept)) > 1
    [dense], [small] = ask(case.dense, cache_shapes), ask(case.small, cache_shapes)
    assert [heads for _, heads, _, _ in small] == kept
    for shapes in (dense, small):
        block_bytes = sum(heads * tokens * channels * 4 for _, heads, tokens, channels in shapes)
        assert {blocks for blocks, *_ in shapes} == {CACHE_BYTES // block_bytes}
    assert small[0][0] > dense[0][0]


def divisible_plan(model: PreTrainedModel) -> PruningPlan:
    """Unequal widths that two devices can share; the one key/value head of the second layer goes to both."""
    widths = {"self_attn": (4, 1, 2), "mlp": (96, 32, 64)}
    kept = {}
    for block in nirvana.describe(model).blocks:
        layer, kind = block.name.removeprefix("model.layers.").split(".")
        kept[block.name] = tuple(range(block.size))[-widths[kind][int(layer)] :]
    return make_plan(nirvana.describe(model), kept, {})


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="each of two workers wants a core of its own")
def test_tensor_parallel(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join(map(str, sorted(os.sched_getaffinity(0))[:2])))
    case = make_case(tmp_path, "llama-parallel", divisible_plan)
    [(tokens, scores)] = ask(case.dense, answers, **case.load_time, tensor_parallel_size=2)
    expected_tokens, expected_scores = expected_answers(nirvana.load(case.small))
    assert tokens == expected_tokens
    torch.testing.assert_close(scores, expected_scores, rtol=0, atol=1e-5)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="each of two workers wants a core of its own")
def test_layer_that_cannot_be_shared_is_named(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join(map(str, sorted(os.sched_getaffinity(0))[:2])))
    case = make_case(tmp_path, "llama")
    with pytest.raises(Exception, match="initialization failed"):
        ask(case.small, tensor_parallel_size=2)
    printed = "".join(capfd.readouterr())
    assert "layer 0 has 12 query heads, 4 key/value heads and 37 neurons" in printed
    assert "--tensor-parallel-size 2 does not divide; prune with --tensor-parallel 2" in printed


def test_compiled(tmp_path):
    """vLLM's default: torch.compile over layers of different widths."""
    case = make_case(tmp_path, "qwen3")
    [(tokens, _)] = ask(case.small, answers, enforce_eager=False)
    assert tokens == expected_answers(nirvana.load(case.small))[0]


def test_plan_beside_the_weights(tmp_path):
    case = make_case(tmp_path, "llama")
    with pytest.raises(NirvanaError, match=r"no plan at .*nirvana_plan\.json; name one: --hf-overrides"):
        ask(case.dense, config_format="nirvana")
    case.plan.save(case.dense / "nirvana_plan.json")
    [(tokens, _)] = ask(case.dense, answers, config_format="nirvana")
    assert tokens == expected_answers(nirvana.load(case.small))[0]


def test_plan_of_another_model_is_refused(tmp_path):
    case, other = make_case(tmp_path / "a", "llama"), make_case(tmp_path / "b", "qwen2")
    with pytest.raises(NirvanaError, match="the plan is for family 'qwen2', the model is 'llama'"):
        ask(case.dense, **other.load_time)


def test_quantised_base_is_refused(tmp_path):
    case = make_case(tmp_path, "llama")
    file = case.dense / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(NirvanaError, match="is quantised; prune the unquantised checkpoint"):
        ask(case.dense, **case.load_time)


def test_config_of_a_checkpoint_that_holds_class_files(tmp_path):
    """A folder may carry code for machines without nirvana; where the plugin is, that code must not be asked for."""
    case = make_case(tmp_path, "llama")
    file = case.small / "config.json"
    code = {"AutoConfig": "missing.Config", "AutoModel": "missing.Model", "AutoModelForCausalLM": "missing.Causal"}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": code}))
    assert ask(case.small, class_name) == ["nirvana.serving.vllm.models.PrunedLlamaForCausalLM"]
