"""mask-fisher and mask-abs against float64 autograd of a mask on every unit of every example."""

from __future__ import annotations

import copy
import json

import families
import pytest
import torch
import torch.nn.functional as F
from test_saliency import build as small_model
from test_saliency import draw_tokens, in_float64, state_of, used_model

from nirvana import NirvanaError, Saliency, describe, score
from nirvana.architectures.inputs import model_inputs
from nirvana.saliency import needs_calibration

pytestmark = pytest.mark.usefixtures("one_thread")

RULES = {"mask-fisher": lambda m: m.square().sum(0), "mask-abs": lambda m: m.abs().sum(0)}
RIGHT = torch.tensor([[1] * 12, [1] * 9 + [0] * 3, [1] * 11 + [0], [1] * 8 + [0] * 4])


def model_and_tokens(name, examples=4, length=12):
    model = families.build(families.CONFIGS[name], seed=3)
    generator = torch.Generator().manual_seed(4)
    return model, torch.randint(families.VOCABULARY, (examples, length), generator=generator)


def oracle(model, tokens, objective, mask=None) -> dict[str, torch.Tensor]:
    """Block -> m float64 [examples, units]: masks of ones on the input of o_proj and down_proj, differentiated."""
    model = in_float64(model)
    inputs = model_inputs(model, tokens, mask)
    masks, handles = {}, []
    for name, module in model.named_modules():
        leaf = name.rsplit(".", 1)[-1]
        if leaf in ("o_proj", "down_proj", "o", "wo"):
            heads = leaf in ("o_proj", "o")
            channels = module.in_features
            if heads:
                config = model.config
                encoder_decoder = config.is_encoder_decoder
                channels //= config.num_heads if encoder_decoder else config.num_key_value_heads
            else:
                channels = 1
            ones = torch.ones(len(tokens), module.in_features // channels, dtype=torch.float64, requires_grad=True)
            masks[name.rsplit(".", 1)[0]] = ones

            def multiply(module, args, ones=ones, channels=channels):
                return args[0] * ones.repeat_interleave(channels, dim=1)[:, None, :]

            handles.append(module.register_forward_pre_hook(multiply))
    logits = model(**inputs.arguments).logits
    if objective == "nll":
        value = F.cross_entropy(logits.flatten(0, 1), inputs.targets.flatten(), ignore_index=-100)
    else:
        value = logits.masked_fill(~inputs.valid[:, :, None], float("-inf")).max(dim=1).values.mean()
    gradients = torch.autograd.grad(value, list(masks.values()))
    return dict(zip(masks, gradients, strict=True))


def assert_near(ours, expected, rtol=2e-5):
    """`rtol` of each score; those that cancel to nearly nothing are measured by the block's largest."""
    assert set(ours) == set(expected)
    for block, truth in expected.items():
        assert ours[block].dtype == torch.float32
        error = (ours[block].double() - truth).abs()
        assert (error <= rtol * truth + 1e-6 * truth.max()).all(), block
        assert error.max() > 0, "a float64 truth cannot be met exactly: the oracle would be comparing with itself"


@pytest.mark.parametrize("objective", ["nll", "max-logit"])
@pytest.mark.parametrize("name", families.ALL)
def test_scores_are_those_of_explicit_masks(name, objective):
    model, tokens = model_and_tokens(name)
    truth = oracle(model, tokens, objective)
    for criterion, rule in RULES.items():
        ours = score(model, tokens, criterion=criterion, objective=objective)
        assert list(ours) == [block.name for block in describe(model).blocks]
        assert_near(ours, {block: rule(m) for block, m in truth.items()})


@pytest.mark.parametrize("name", ["llama-head-dim", "qwen2", "t5-gated"])
@pytest.mark.parametrize("mask", [RIGHT, RIGHT.flip(1)], ids=["right", "left"])
def test_padding_counts_for_nothing(name, mask):
    model, tokens = model_and_tokens(name)
    truth = oracle(model, tokens, "nll", mask)
    for filler in (0, 55):
        padded = tokens.masked_fill(mask == 0, filler)
        ours = score(model, padded, criterion="mask-fisher", attention_mask=mask)
        assert_near(ours, {block: m.square().sum(0) for block, m in truth.items()})


@pytest.mark.parametrize("criterion", RULES)
@pytest.mark.parametrize("name", ["llama-biases", "qwen3", "t5"])
def test_micro_batches_give_the_scores_of_one_batch(name, criterion):
    """4 examples by 1, 2 and 3 (3 + 1), one of them padded; the mean stays that of the whole batch."""
    model, tokens = model_and_tokens(name)
    whole = score(model, tokens, criterion=criterion, attention_mask=RIGHT, micro_batch=4)
    for size in (1, 2, 3, None):
        ours = score(model, tokens, criterion=criterion, attention_mask=RIGHT, micro_batch=size)
        for block, scores in whole.items():
            torch.testing.assert_close(ours[block], scores, rtol=1e-5, atol=1e-6 * float(scores.max()))


def test_examples_count_one_by_one():
    """Derivatives of different examples must not cancel: that criterion is far worse."""
    model, tokens = model_and_tokens("llama")
    ours = score(model, tokens, criterion="mask-abs")
    for block, m in oracle(model, tokens, "nll").items():
        assert (m.sum(0).abs() < 0.9 * ours[block]).any()


def test_scores_of_single_examples_add_up():
    """Alone, an example is divided by 1 and not by the 4 of the batch: the convention that the docstring states."""
    model, tokens = model_and_tokens("qwen3-tied")
    whole = score(model, tokens, criterion="mask-fisher")
    alone = [score(model, row[None], criterion="mask-fisher") for row in tokens]
    for block, scores in whole.items():
        total = sum(one[block] for one in alone) / 4**2
        torch.testing.assert_close(total, scores, rtol=1e-4, atol=1e-6 * float(scores.max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_fp32_scores_near_the_truth(dtype):
    model, tokens = model_and_tokens("llama", 8, 24)
    model = model.to(dtype)
    ours = score(model, tokens, criterion="mask-abs")
    truth = {block: m.abs().sum(0) for block, m in oracle(model, tokens, "nll").items()}
    error = sum(float((ours[block].double() - scores).abs().sum()) for block, scores in truth.items())
    assert all(scores.dtype == torch.float32 for scores in ours.values())
    assert error / sum(float(scores.sum()) for scores in truth.values()) < 0.05


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("name", ["llama-tied", "t5"])
def test_the_model_is_left_as_found(name, micro_batch):
    model = used_model(name)
    before = state_of(model)
    score(model, draw_tokens(), criterion="mask-fisher", micro_batch=micro_batch)
    after = state_of(model)
    for key in before:
        assert after[key] == before[key], key


def test_the_model_is_left_as_found_when_interrupted():
    model = used_model("llama-biases")
    before = state_of(model)

    def progress():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(model, draw_tokens(), criterion="mask-fisher", progress=progress)
    after = state_of(model)
    for key in before:
        assert after[key] == before[key], key


def test_no_weight_ever_gets_a_gradient():
    """Also in a model that trains, whose caller switched gradients off."""
    model, tokens = small_model("t5"), draw_tokens()
    expected = score(model, tokens, criterion="mask-abs")
    received = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(received.append)
    with torch.no_grad():
        ours = score(model.train(), tokens, criterion="mask-abs")
    assert not received
    assert all(torch.equal(ours[block], expected[block]) for block in expected)


def test_progress_is_called_once_for_each_tensor():
    model, calls = small_model("llama-biases"), []
    for options in ({}, {"micro_batch": 1}, {"micro_batch": 2}):
        calls.clear()
        score(model, draw_tokens(), criterion="mask-fisher", progress=lambda: calls.append(0), **options)
        assert len(calls) == 2 * (4 + 3 + 3 + 2)


def test_each_criterion_has_an_objective_of_its_own():
    model, tokens = small_model("qwen2"), draw_tokens()
    for criterion, own, other in (("nirvana", "max-logit", "nll"), ("mask-fisher", "nll", "max-logit")):
        scores = score(model, tokens, criterion=criterion)
        assert scores.settings["objective"] == own
        same = score(model, tokens, criterion=criterion, objective=own)
        changed = score(model, tokens, criterion=criterion, objective=other)
        assert all(torch.equal(scores[block], same[block]) for block in scores)
        assert not any(torch.equal(scores[block], changed[block]) for block in scores)


@pytest.mark.parametrize(
    ("criterion", "needed"),
    [("nirvana", True), ("mask-abs", True), ("magnitude", False), ("random", False), ("random+mask-abs", True)],
)
def test_who_needs_calibration(criterion, needed):
    assert needs_calibration(criterion) is needed
    if needed:
        with pytest.raises(NirvanaError, match="needs a calibration batch"):
            score(small_model("llama"), None, criterion=criterion)


def test_a_weight_that_is_not_finite_is_named():
    model = small_model("llama-biases")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[2, 3] = float("nan")
    with pytest.raises(NirvanaError, match=r"parameter model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        score(model, draw_tokens(), criterion="mask-fisher")


def test_a_gradient_that_is_not_finite_is_named():
    model = small_model("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(3e38)
    with pytest.raises(NirvanaError, match=r"gradient of a mask on model\.layers\.\d\.\w+ holds NaN or infinity"):
        score(model, draw_tokens(), criterion="mask-fisher")


def test_from_the_command_line(cli_here, llama_folder, tokens_file, tmp_path):
    path = tmp_path / "s.safetensors"
    outcome = cli_here(
        "score", llama_folder, "--calibration", tokens_file, "--criterion", "mask-fisher", "--out", path, "--json"
    )
    assert outcome.code == 0, outcome.stderr
    settings = json.loads(outcome.stdout)["settings"]
    assert (settings["criterion"], settings["objective"]) == ("mask-fisher", "nll")
    assert all((scores > 0).all() for scores in Saliency.load(path).values())


def test_a_copy_of_the_model_gives_the_same_bits():
    model, tokens = model_and_tokens("t5-deep-decoder")
    runs = [score(copy.deepcopy(model), tokens, criterion="mask-fisher") for _ in range(2)]
    assert all(torch.equal(runs[0][block], runs[1][block]) for block in runs[0])
