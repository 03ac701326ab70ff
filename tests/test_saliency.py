"""Scores against plain autograd in float64 that builds all logits and sums |gradient x weight| unit by unit."""

from __future__ import annotations

import copy
import hashlib
import json
import struct
import weakref

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, T5Config

from nirvana import NirvanaError, Saliency, describe, score
from nirvana.architectures.inputs import model_inputs
from nirvana.parameters import auto_class

VOCABULARY = 71


@pytest.fixture(autouse=True)
def threads():
    """Tiny matrices: a second thread would only be waited for. Called with a number, it sets another count."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


def decoder(config_class, hidden, heads, groups, width, **more):
    return config_class(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        intermediate_size=width,
        max_position_embeddings=64,
        **{"tie_word_embeddings": False, **more},
    )


def t5(**more):
    return T5Config(
        vocab_size=VOCABULARY,
        d_model=20,
        d_kv=6,
        num_heads=3,
        d_ff=17,
        num_layers=2,
        num_decoder_layers=2,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=10,
        decoder_start_token_id=0,
        **more,
    )


#: Query heads per key/value head 1, 3, 4 and 8, biases, tied heads, own head_dim, a window shorter than the text.
CONFIGS = {
    "llama": decoder(LlamaConfig, 24, 6, 2, 13),
    "llama-biases": decoder(LlamaConfig, 16, 4, 4, 11, attention_bias=True, mlp_bias=True),
    "llama-tied": decoder(LlamaConfig, 32, 8, 2, 19, tie_word_embeddings=True),
    "mistral": decoder(MistralConfig, 20, 9, 3, 15, head_dim=4, sliding_window=5),
    "qwen2": decoder(Qwen2Config, 32, 8, 1, 21),
    "qwen3": decoder(Qwen3Config, 20, 8, 2, 17, head_dim=6, tie_word_embeddings=True),
    "qwen3-biases": decoder(Qwen3Config, 20, 3, 3, 17, head_dim=10, attention_bias=True),
    "t5": t5(),
    "t5-gated": t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
}
ALL = tuple(CONFIGS)
OBJECTIVES = ("max-logit", "nll")


def build(name: str, seed: int = 0, config=None):
    """A random model whose logits are of size one and whose biases and norms are not trivial."""
    config = copy.deepcopy(config or CONFIGS[name])
    model = auto_class(config).from_config(config)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            values = 0.3 * values + (0 if key.endswith("bias") else 1)
        elif "embed" not in key and "shared" not in key and "relative" not in key:
            values = values / parameter.shape[1] ** 0.5
        parameter.data.copy_(values)
    return model.eval()


def draw_tokens(examples: int = 5, length: int = 12, seed: int = 1, vocabulary: int = VOCABULARY) -> torch.Tensor:
    return torch.randint(vocabulary, (examples, length), generator=torch.Generator().manual_seed(seed))


# ---- the oracle: everything literal, nothing of nirvana.saliency ----------------------------------------------------


class Norm(nn.Module):
    """RMS norm in the type of its input; transformers' own rounds to fp32 on the way, also in a float64 model."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon)


def in_float64(model):
    model = copy.deepcopy(model).double()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith(("RMSNorm", "LayerNorm")):
                setattr(parent, name, Norm(child))
    return model


def units_of(model) -> dict[str, list[list[tuple[str, int, slice]]]]:
    """Block -> unit -> (parameter, axis, rows or columns): written out from the configuration, by hand."""
    config, blocks = model.config, {}
    names = dict(model.named_parameters())

    def attention(name, projections, output, groups, ratio, head):
        blocks[name] = []
        for k in range(groups):
            own = []
            for index, projection in enumerate(projections):
                width = ratio * head if index == 0 else head
                for kind in ("weight", "bias"):
                    if f"{name}.{projection}.{kind}" in names:
                        own.append((f"{name}.{projection}.{kind}", 0, slice(k * width, (k + 1) * width)))
            own.append((f"{name}.{output}.weight", 1, slice(k * ratio * head, (k + 1) * ratio * head)))
            blocks[name].append(own)

    def mlp(name, inner, output, width):
        blocks[name] = []
        for j in range(width):
            own = [
                (f"{name}.{part}.{kind}", 0, slice(j, j + 1))
                for part in inner
                for kind in ("weight", "bias")
                if f"{name}.{part}.{kind}" in names
            ]
            blocks[name].append([*own, (f"{name}.{output}.weight", 1, slice(j, j + 1))])

    if config.is_encoder_decoder:
        inner = ("wi_0", "wi_1") if config.is_gated_act else ("wi",)
        for stack, depth in (("encoder", config.num_layers), ("decoder", config.num_decoder_layers)):
            for i in range(depth):
                layer = f"{stack}.block.{i}.layer"
                attention(f"{layer}.0.SelfAttention", "qkv", "o", config.num_heads, 1, config.d_kv)
                if stack == "decoder":
                    attention(f"{layer}.1.EncDecAttention", "qkv", "o", config.num_heads, 1, config.d_kv)
                mlp(f"{layer}.{1 + (stack == 'decoder')}.DenseReluDense", inner, "wo", config.d_ff)
        return blocks
    groups = config.num_key_value_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    ratio = config.num_attention_heads // groups
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        attention(f"{layer}.self_attn", ("q_proj", "k_proj", "v_proj"), "o_proj", groups, ratio, head)
        mlp(f"{layer}.mlp", ("gate_proj", "up_proj"), "down_proj", config.intermediate_size)
    return blocks


def objective_value(objective, logits, targets, valid):
    if objective == "max-logit":
        best = logits.masked_fill(~valid[:, :, None], float("-inf")).max(dim=1).values
        return best.mean()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


def unit_sums(model, gradients) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters())
    product = {key: (gradients[key] * parameters[key].detach()).abs() for key in gradients}

    def unit_sum(unit):
        return sum((product[key][where] if axis == 0 else product[key][:, where]).sum() for key, axis, where in unit)

    return {block: torch.stack([unit_sum(unit) for unit in units]) for block, units in units_of(model).items()}


def scored_parameters(model) -> dict[str, nn.Parameter]:
    used = {key for units in units_of(model).values() for unit in units for key, _, _ in unit}
    return {key: parameter for key, parameter in model.named_parameters() if key in used}


def oracle(model, tokens, objective, mask=None) -> dict[str, torch.Tensor]:
    """Scores in the type of the model: one forward pass, all logits, one backward pass."""
    inputs = model_inputs(model, tokens, mask)
    value = objective_value(objective, model(**inputs.arguments).logits, inputs.targets, inputs.valid)
    parameters = scored_parameters(model)
    gradients = torch.autograd.grad(value, list(parameters.values()))
    return unit_sums(model, dict(zip(parameters, gradients, strict=True)))


def alone(model, row, real):
    """(arguments, targets) of one example without its padding."""
    if not model.config.is_encoder_decoder:
        ids = row[real][None]
        return {"input_ids": ids}, F.pad(ids[:, 1:], (0, 1), value=-100)
    half = len(row) // 2
    source, target = row[:half][real[:half]][None], row[half:][real[half:]][None]
    shifted = F.pad(target[:, :-1], (1, 0), value=model.config.decoder_start_token_id)
    return {"input_ids": source, "decoder_input_ids": shifted}, target


def oracle_without_padding(model, tokens, objective, mask) -> dict[str, torch.Tensor]:
    """Each example in a forward pass of its own; gradients are summed before the absolute value is taken."""
    examples = [alone(model, row, real.bool()) for row, real in zip(tokens, mask, strict=True)]
    count = sum(int((targets != -100).sum()) for _, targets in examples)
    value = 0.0
    for arguments, targets in examples:
        logits = model(**arguments).logits
        if objective == "max-logit":
            value = value + logits.max(dim=1).values.sum() / (len(examples) * logits.shape[-1])
        else:
            value = value + F.cross_entropy(logits[0], targets[0], ignore_index=-100, reduction="sum") / count
    parameters = scored_parameters(model)
    gradients = torch.autograd.grad(value, list(parameters.values()))
    return unit_sums(model, dict(zip(parameters, gradients, strict=True)))


def assert_same(ours, expected, rtol):
    assert list(ours) == list(expected)
    for block, scores in expected.items():
        assert ours[block].dtype == torch.float32
        torch.testing.assert_close(
            ours[block].double(), scores.double(), rtol=rtol, atol=0, msg=lambda m, b=block: b + m
        )


# ---- the formulas ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", ALL)
def test_scores_are_those_of_autograd_in_float64(name, objective):
    """And not less exact than autograd in fp32 that builds all logits, but for one rounding of the sums."""
    model, tokens = build(name), draw_tokens()
    ours = score(model, tokens, objective=objective)
    truth = oracle(in_float64(model), tokens, objective)
    eager = oracle(model, tokens, objective)
    assert list(ours) == [block.name for block in describe(model).blocks] == list(truth)
    for block, exact in truth.items():
        error = (ours[block].double() - exact).abs()
        reference = (eager[block].double() - exact).abs()
        assert (error <= reference + 1e-6 * exact).all(), block
        assert error.max() > 0, "a float64 truth cannot be met exactly: the oracle would be comparing with itself"


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_one_example_of_two_tokens_is_enough(name):
    model, tokens = build(name), draw_tokens(1, 2)
    for objective in OBJECTIVES:
        assert_same(score(model, tokens, objective=objective), oracle(in_float64(model), tokens, objective), 1e-5)


def test_an_odd_number_of_tokens_is_divided_as_for_evaluation():
    model, tokens = build("t5-gated"), draw_tokens(3, 11)
    assert_same(score(model, tokens), oracle(in_float64(model), tokens, "max-logit"), 1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", ["llama-biases", "qwen3", "mistral", "t5", "t5-gated"])
def test_micro_batches_give_the_scores_of_one_batch(name, objective):
    """Gradients are summed before the absolute value: 5 examples by 1, 2 and 3 (2 + 2 + 1, 3 + 2)."""
    model, tokens = build(name), draw_tokens(5)
    whole = score(model, tokens, objective=objective)
    for size in (1, 2, 3):
        assert_same(score(model, tokens, objective=objective, micro_batch=size), whole, 3e-6)
    for size in (5, 100):
        again = score(model, tokens, objective=objective, micro_batch=size)
        assert all(torch.equal(again[block], whole[block]) for block in whole)


def test_the_gradient_is_that_of_the_whole_batch():
    """Scores of single examples do not add up: signs cancel, and the method wants them to."""
    model, tokens = build("llama"), draw_tokens(5)
    whole = score(model, tokens)
    single = [score(model, tokens[i : i + 1]) for i in range(5)]
    for block, scores in whole.items():
        mean = sum(one[block] for one in single) / 5
        assert (scores < 0.95 * mean).all()


# ---- padding --------------------------------------------------------------------------------------------------------

RIGHT = torch.tensor([[1] * 12, [1] * 9 + [0] * 3, [1] * 11 + [0], [1] * 8 + [0] * 4])
LEFT = RIGHT.flip(1)


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("mask", [RIGHT, LEFT], ids=["right", "left"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "t5", "t5-gated"])
def test_padding_counts_for_nothing(name, objective, mask, micro_batch):
    """A padded batch gives the scores of its examples without padding, whatever the padding holds.

    Left padding too: rotary and relative positions depend on distances alone.
    """
    model = build(name)
    tokens = draw_tokens(4, seed=2)
    expected = oracle_without_padding(in_float64(model), tokens, objective, mask)
    for filler in (0, 55):
        padded = tokens.masked_fill(mask == 0, filler)
        ours = score(model, padded, objective=objective, attention_mask=mask, micro_batch=micro_batch)
        assert_same(ours, expected, 1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_mask_of_ones_changes_nothing(objective):
    model, tokens = build("qwen2"), draw_tokens()
    for dtype in (torch.int64, torch.bool, torch.float32):
        ours = score(model, tokens, objective=objective, attention_mask=torch.ones(tokens.shape, dtype=dtype))
        assert_same(ours, score(model, tokens, objective=objective), 1e-6)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(5, 11), "attention mask has shape"),
        (torch.ones(4, 12), "attention mask has shape"),
        (torch.cat([torch.zeros(1, 12), torch.ones(4, 12)]), "no token to predict"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(mask, message):
    with pytest.raises(NirvanaError, match=message):
        score(build("llama"), draw_tokens(), attention_mask=mask)


# ---- chunks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("elements", [1, 4 * 12 * 5, 4 * 12 * 70, 4 * 12 * 71])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", ["llama", "t5-gated"])
def test_chunks_of_the_vocabulary_change_nothing(monkeypatch, name, objective, elements):
    """One token id at a time, 5 (which does not divide 71), all but one, all."""
    model, tokens = build(name), draw_tokens(4, 12)
    whole = score(model, tokens, objective=objective, attention_mask=RIGHT)
    monkeypatch.setattr("nirvana.ops.head.chunk_elements", lambda device: elements)
    assert_same(score(model, tokens, objective=objective, attention_mask=RIGHT), whole, 3e-6)


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operator returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.untyped_storage().nbytes() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *(size // 4 for size in sizes)])
        return result


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_logits_of_the_whole_batch_never_exist(monkeypatch, objective):
    monkeypatch.setattr("nirvana.ops.head.chunk_elements", lambda device: 2**14)
    config = copy.deepcopy(CONFIGS["llama"])
    config.vocab_size = 3000
    model, tokens = build("", config=config), draw_tokens(8, 32, vocabulary=3000)
    with LargestTensor() as seen:
        score(model, tokens, objective=objective)
    assert seen.elements <= 3000 * 24 < 8 * 32 * 3000 / 10
    with LargestTensor() as seen:
        model(tokens)
    assert seen.elements >= 8 * 32 * 3000, "the counter must see logits where they are built"


class PeakBytes(TorchDispatchMode):
    """The most bytes that existed at once in tensors made inside. Views count once, those of the model not at all."""

    def __init__(self, model):
        super().__init__()
        self.weights = [StorageWeakRef(tensor.untyped_storage()) for tensor in model.state_dict().values()]
        self.known = {reference.cdata for reference in self.weights}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                reference = StorageWeakRef(storage)
                if reference.cdata not in self.known:
                    self.alive[reference.cdata] = reference, storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result


@pytest.mark.parametrize("name", ["llama", "t5-gated"])
def test_activations_of_one_layer_exist_at_a_time(name):
    """Ten layers need what two need, and the inputs of eight more layers."""
    peaks = []
    for layers in (2, 10):
        config = copy.deepcopy(CONFIGS[name])
        if config.is_encoder_decoder:
            config.num_layers = config.num_decoder_layers = layers
            config.d_ff = 500
        else:
            config.num_hidden_layers, config.intermediate_size = layers, 500
        model = build("", config=config)
        with PeakBytes(model) as seen:
            score(model, draw_tokens(8, 32))
        peaks.append(seen.peak)
    one_mlp = 3 * 128 * 500 * 4  # gate, up and their product, for the 128 positions of half a batch
    assert one_mlp < peaks[0]
    assert peaks[1] - peaks[0] < one_mlp


# ---- types ----------------------------------------------------------------------------------------------------------


def distance(ours, truth) -> float:
    """Relative error in the sense of the 1-norm over all units of all blocks."""
    total = sum(scores.sum() for scores in truth.values())
    return float(sum((ours[block].double() - scores).abs().sum() for block, scores in truth.items()) / total)


@pytest.fixture(params=["as on a CPU", "as on a GPU"])
def head_products(request, monkeypatch):
    """How the head of a half-precision model is multiplied; a GPU's way is computed here by the CPU."""
    if request.param == "as on a GPU":
        monkeypatch.setattr("nirvana.ops.head.tensor_cores", lambda hidden, weight: True)


@pytest.mark.usefixtures("head_products")
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama-biases", "qwen3", "t5-gated"])
def test_half_precision_gives_fp32_scores_near_the_truth(name, dtype, objective):
    """As near as autograd in the model's type, which builds all logits and rounds every score."""
    model, tokens = build(name).to(dtype), draw_tokens(8, 24)
    ours = score(model, tokens, objective=objective)
    for scores in ours.values():
        assert scores.dtype == torch.float32
        assert torch.isfinite(scores).all()
    truth = oracle(in_float64(model), tokens, objective)
    eager = oracle(model, tokens, objective)
    assert distance(ours, truth) <= distance(eager, truth) * 1.1 + 1e-3


@pytest.mark.usefixtures("head_products")
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradients_do_not_vanish_in_fp16(objective):
    """1 / (examples x vocabulary) of a real batch is a subnormal fp16 number, and what it multiplies is small."""
    config = copy.deepcopy(CONFIGS["llama"])
    config.vocab_size = 40_000
    model, tokens = build("", config=config), draw_tokens(8, 16, vocabulary=40_000)
    model.lm_head.weight.data *= 0.02
    half = copy.deepcopy(model).to(torch.float16)
    truth = oracle(in_float64(half), tokens, objective)
    ours = score(half, tokens, objective=objective)
    assert all((scores > 0).all() for scores in ours.values())
    assert distance(ours, truth) < 0.02


# ---- the model is left as found -------------------------------------------------------------------------------------


def state_of(model) -> dict:
    """All that a walk could leave behind."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "learning": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [id(parameter.grad) if parameter.grad is not None else None for parameter in model.parameters()],
        "gradient values": [None if p.grad is None else p.grad.clone().tolist() for p in model.parameters()],
        "training": [module.training for module in model.modules()],
        "forwards": [module.__dict__.get("forward") for module in model.modules()],
        "module hooks": [len(getattr(module, kind)) for module in model.modules() for kind in hooks],
        "tensor hooks": [
            (len(p._backward_hooks or ()), len(getattr(p, "_post_accumulate_grad_hooks", None) or ()))
            for p in model.parameters()
        ],
        "weights": {key: (tensor.data_ptr(), tensor.dtype) for key, tensor in model.state_dict().items()},
        "values": {key: tensor.tolist() for key, tensor in model.state_dict().items()},
        "configuration": model.config.to_dict(),
        "random state": torch.get_rng_state().tolist(),
        "gradients on": torch.is_grad_enabled(),
    }


def used_model(name):
    """A model in the middle of somebody's training: frozen parts, gradients, dropout, a hook, a forward of its own."""
    model = build(name).train()
    parameters = dict(model.named_parameters())
    for index, (key, parameter) in enumerate(parameters.items()):
        parameter.requires_grad_(index % 3 != 0)
        if index % 2:
            parameter.grad = torch.full_like(parameter, float(index))
        assert key in parameters
    head = model.get_output_embeddings()
    forward = head.forward
    head.forward = lambda hidden: forward(hidden)
    head.register_forward_hook(lambda module, inputs, output: output)
    return model


@pytest.mark.parametrize("micro_batch", [None, 2])
@pytest.mark.parametrize("name", ["llama-tied", "t5"])
def test_the_model_is_left_as_found(name, micro_batch):
    model = used_model(name)
    before = state_of(model)
    score(model, draw_tokens(), micro_batch=micro_batch)
    after = state_of(model)
    for key in before:
        assert after[key] == before[key], key


def test_modules_keep_their_own_training_mode():
    """One part may be frozen in evaluation mode inside a model that trains."""
    model = build("llama").train()
    model.model.layers[0].eval()
    before = state_of(model)["training"]
    score(model, draw_tokens())
    assert state_of(model)["training"] == before


class StopHereError(Exception):
    pass


@pytest.mark.parametrize("after_tensors", [1, 5])
def test_the_model_is_left_as_found_when_interrupted(after_tensors):
    """In the middle of the backward pass, from the caller's own progress function."""
    model = used_model("llama-biases")
    before = state_of(model)
    calls = []

    def progress():
        calls.append(0)
        if len(calls) == after_tensors:
            raise StopHereError

    with pytest.raises(StopHereError):
        score(model, draw_tokens(), progress=progress, micro_batch=3)
    after = state_of(model)
    for key in before:
        assert after[key] == before[key], key


def test_the_model_is_left_as_found_when_it_is_refused():
    model = used_model("qwen2")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = float("inf")
    before = state_of(model)
    with pytest.raises(NirvanaError):
        score(model, draw_tokens())
    after = state_of(model)
    for key in before:
        assert after[key] == before[key], key


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_mode_and_context_of_the_caller_do_not_matter(name):
    """Dropout is off although the model trains, gradients are on although the caller switched them off."""
    model, tokens = build(name), draw_tokens()
    expected = score(model, tokens)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    model.requires_grad_(False)
    with torch.no_grad():
        ours = score(model, tokens)
    assert all(torch.equal(ours[block], expected[block]) for block in expected)


# ---- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-tied", "qwen3-biases", "t5", "t5-gated"])
def test_only_scored_weights_get_gradients_and_never_together(name):
    model = build(name)
    scored = {id(parameter): key for key, parameter in scored_parameters(model).items()}
    received, gradients, alive = [], [], []

    def arrived(parameter):
        received.append(id(parameter))
        gradients.append(weakref.ref(parameter.grad))

    handles = [parameter.register_post_accumulate_grad_hook(arrived) for parameter in model.parameters()]

    def progress():
        alive.append(sum(reference() is not None for reference in gradients))
        assert sum(parameter.grad is not None for parameter in model.parameters()) <= 1

    score(model, draw_tokens(), progress=progress)
    for handle in handles:
        handle.remove()
    assert {scored.get(key, "not a prunable weight") for key in received} == set(scored.values())
    assert len(alive) == len(received) == len(scored)
    assert max(alive) == 1, "the gradient that was just reduced, and no other"
    assert not any(reference() is not None for reference in gradients)


def test_progress_is_called_once_for_each_tensor():
    model, calls = build("llama-biases"), []
    tensors = 2 * (4 + 3 + 3 + 2)
    for options in ({}, {"micro_batch": 2}, {"criterion": "magnitude"}):
        calls.clear()
        score(model, draw_tokens(), progress=lambda: calls.append(0), **options)
        assert len(calls) == tensors


# ---- criteria -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_magnitude_is_the_sum_of_absolute_weights(name, dtype):
    model = build(name).to(dtype)
    ones = {key: torch.ones_like(parameter).double() for key, parameter in scored_parameters(model).items()}
    ours = score(model, criterion="magnitude")
    assert_same(ours, unit_sums(copy.deepcopy(model).double(), ones), 1e-6)
    assert ours.settings == {"criterion": "magnitude"}


def test_random_depends_on_the_seed_and_on_nothing_else():
    scores = [score(build("qwen2", seed), criterion="random", seed=3) for seed in (0, 1)]
    other = score(build("qwen2"), criterion="random", seed=4)
    torch.rand(1)
    for block, values in scores[0].items():
        assert torch.equal(values, scores[1][block])
        assert values.dtype == torch.float32
        assert ((values >= 0) & (values < 1)).all()
    assert not torch.equal(scores[0]["model.layers.0.mlp"], other["model.layers.0.mlp"])
    assert not torch.equal(scores[0]["model.layers.0.mlp"], scores[0]["model.layers.1.mlp"])
    assert scores[0].settings == {"criterion": "random", "seed": 3}
    assert [len(values) for values in scores[0].values()] == [b.size for b in describe(build("qwen2")).blocks]


def test_settings_say_what_led_to_the_scores():
    tokens = torch.arange(6).view(2, 3)
    settings = score(build("llama"), tokens, objective="nll").settings
    assert settings == {
        "criterion": "nirvana",
        "objective": "nll",
        "calibration_shape": [2, 3],
        "calibration_sha256": hashlib.sha256(struct.pack("<6q", *range(6))).hexdigest(),
    }


# ---- determinism ----------------------------------------------------------------------------------------------------


def larger_model():
    """Large enough that matrix products and sums are divided among threads."""
    return build("", config=decoder(LlamaConfig, 192, 6, 2, 520))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_same_batch_gives_the_same_bits(objective, threads):
    threads(2)
    model, tokens = larger_model(), draw_tokens(8, 48)
    runs = [score(model, tokens, objective=objective) for _ in range(3)]
    for again in runs[1:]:
        assert all(torch.equal(again[block], runs[0][block]) for block in runs[0])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_threads_do_not_change_the_bits(objective, threads):
    model, tokens = larger_model(), draw_tokens(8, 48)
    runs = []
    for count in (1, 2):
        threads(count)
        runs.append(score(model, tokens, objective=objective))
    assert all(torch.equal(runs[0][block], runs[1][block]) for block in runs[0])


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.k_proj.bias", "model.norm.weight"]
)
def test_a_weight_that_is_not_finite_is_named(name, value):
    model = build("llama-biases")
    with torch.no_grad():
        model.get_parameter(name).view(-1)[3] = value
    with pytest.raises(NirvanaError, match=name.replace(".", r"\.")):
        score(model, draw_tokens())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named_without_data(value):
    model = build("qwen2")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[5, 5] = value
    with pytest.raises(NirvanaError, match=r"parameter model\.layers\.1\.mlp\.down_proj\.weight holds (NaN|infinity)"):
        score(model, criterion="magnitude")


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_gradient_that_is_not_finite_is_named(objective):
    """All weights are finite and so are the hidden states; the head's rows overflow when they are added up."""
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(3e38)
    with pytest.raises(NirvanaError, match=r"gradient of model\.layers\.\d\.\w+\.\w+\.weight holds NaN or infinity"):
        score(model, draw_tokens(), objective=objective)


def test_overflow_in_half_precision_names_the_remedy():
    model = build("llama").to(torch.float16)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.fill_(6e4)
            layer.mlp.up_proj.weight.fill_(6e4)
    with pytest.raises(NirvanaError, match=r"float16.*--dtype float32"):
        score(model, draw_tokens())


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (draw_tokens(), {"criterion": "wanda++"}, "--criterion 'wanda\\+\\+' is unknown; known are nirvana, magnitude"),
        (draw_tokens(), {"objective": "loss"}, "--objective 'loss' is unknown; known are max-logit, nll"),
        (None, {}, "criterion 'nirvana' needs a calibration batch"),
        (draw_tokens(), {"micro_batch": 0}, "--micro-batch 0 must be at least 1"),
        (draw_tokens(), {"micro_batch": -2}, "--micro-batch -2 must be at least 1"),
        (draw_tokens().int(), {}, r"tokens are torch\.int32 of shape \[5, 12\]; give int64"),
        (draw_tokens().float(), {}, r"tokens are torch\.float32"),
        (draw_tokens()[0], {}, r"of shape \[12\]; give int64 \[examples, tokens\]"),
        (draw_tokens()[None], {}, r"of shape \[1, 5, 12\]"),
        (draw_tokens()[:0], {}, "at least 1 example of 2 tokens"),
        (draw_tokens()[:, :1], {}, "at least 1 example of 2 tokens"),
        (torch.tensor([[1, 71]]), {}, "token id 71 is outside the model's vocabulary of 71"),
        (torch.tensor([[1, -1]]), {}, "token id -1 is outside the model's vocabulary of 71"),
    ],
)
def test_bad_arguments_are_refused(tokens, options, message):
    with pytest.raises(NirvanaError, match=message):
        score(build("llama"), tokens, **options)


# ---- the file -------------------------------------------------------------------------------------------------------


def test_the_saliency_file_is_these_bytes(tmp_path):
    """safetensors: length of the header, the header padded to a multiple of 8 bytes, the numbers."""
    path = tmp_path / "s.safetensors"
    Saliency({"b": torch.tensor([1.0, -2.0]), "a": torch.tensor([0.5])}, {"seed": 1, "criterion": "x"}).save(path)
    header = (
        b'{"__metadata__":{"nirvana-saliency":"{\\"version\\": 1, \\"settings\\": '
        b'{\\"seed\\": 1, \\"criterion\\": \\"x\\"}}"},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}'
    )
    header += b" " * (-len(header) % 8)
    numbers = bytes.fromhex("0000003f 0000803f 000000c0")
    assert path.read_bytes() == len(header).to_bytes(8, "little") + header + numbers


def test_what_is_read_back_is_the_saliency(tmp_path):
    model, tokens = build("llama-biases"), draw_tokens()
    first, second = score(model, tokens), score(model, tokens)
    first.save(tmp_path / "1.safetensors")
    second.save(tmp_path / "2.safetensors")
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()
    stored = Saliency.load(tmp_path / "1.safetensors")
    assert stored.settings == first.settings
    assert set(stored) == set(first)
    for block, scores in first.items():
        assert stored[block].dtype == torch.float32
        assert torch.equal(stored[block], scores)


def test_save_replaces_only_when_told_to(tmp_path):
    saliency = Saliency({"a": torch.ones(1)})
    path = tmp_path / "s.safetensors"
    path.write_text("mine")
    with pytest.raises(NirvanaError, match="exists"):
        saliency.save(path)
    assert path.read_text() == "mine"
    saliency.save(path, overwrite=True)
    assert torch.equal(Saliency.load(path)["a"], torch.ones(1))
    assert [file.name for file in tmp_path.iterdir()] == ["s.safetensors"]


@pytest.mark.parametrize("content", [b"", b"{}", b"\x00" * 64, b"\xff" * 64, b"PK\x03\x04 not safetensors"])
def test_what_is_not_safetensors_is_refused(tmp_path, content):
    path = tmp_path / "s.safetensors"
    path.write_bytes(content)
    with pytest.raises(NirvanaError, match=r"s\.safetensors is not a saliency file"):
        Saliency.load(path)


def test_a_truncated_file_is_refused(tmp_path):
    path = tmp_path / "s.safetensors"
    Saliency({"a": torch.ones(100)}).save(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(NirvanaError, match="is not a saliency file"):
        Saliency.load(path)


def test_a_missing_file_is_named(tmp_path):
    for place in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(NirvanaError, match=f"no saliency file at {place}"):
            Saliency.load(place)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, 'its metadata has no "nirvana-saliency"'),
        ({"format": "pt"}, 'its metadata has no "nirvana-saliency"'),
        ({"nirvana-saliency": json.dumps({"version": 2, "settings": {}})}, "saliency version 2 is not supported"),
        ({"nirvana-saliency": json.dumps({"settings": {}})}, "saliency version None is not supported"),
        ({"nirvana-saliency": "not JSON"}, "is not a saliency file"),
        ({"nirvana-saliency": "[]"}, "is not a saliency file"),
        ({"nirvana-saliency": json.dumps({"version": 1})}, "is not a saliency file"),
    ],
)
def test_metadata_of_another_kind_is_refused(tmp_path, metadata, message):
    path = tmp_path / "s.safetensors"
    save_file({"a": torch.ones(1)}, path, metadata)
    with pytest.raises(NirvanaError, match=message):
        Saliency.load(path)
