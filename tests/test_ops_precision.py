"""Settings of torch inside and after `exact`, and what a backward pass of attention runs under."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from test_saliency import build, draw_tokens

from nirvana import score
from nirvana.ops.precision import _repeatable_attention, exact, launched_deterministically

MATMUL = torch.backends.cuda.matmul
CPU, CUDA = [torch.device("cpu")], [torch.device("cpu"), torch.device("cuda", 1)]


def settings() -> dict:
    return {
        "fp32": MATMUL.fp32_precision,
        "precision": torch.get_float32_matmul_precision(),
        "bf16": MATMUL.allow_bf16_reduced_precision_reduction,
        "bf16 split": MATMUL.allow_bf16_reduced_precision_reduction_split_k,
        "fp16": MATMUL.allow_fp16_reduced_precision_reduction,
        "fp16 split": MATMUL.allow_fp16_reduced_precision_reduction_split_k,
        "deterministic": torch.get_deterministic_debug_mode(),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,
        "cudnn attention": torch.backends.cuda.cudnn_sdp_enabled(),
    }


@pytest.fixture(params=["as torch starts", "all on", "the caller's own"])
def caller(request):
    """What the caller has set, and afterwards what the other tests have."""
    before = settings()
    if request.param == "all on":
        torch.set_float32_matmul_precision("high")
        torch.set_deterministic_debug_mode("warn")
    elif request.param == "the caller's own":
        MATMUL.allow_bf16_reduced_precision_reduction = (False, False)
        MATMUL.allow_fp16_reduced_precision_reduction = (False, False)
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.set_deterministic_debug_mode("error")
    yield settings()
    torch.set_float32_matmul_precision(before["precision"])
    MATMUL.fp32_precision = before["fp32"]
    MATMUL.allow_bf16_reduced_precision_reduction = (before["bf16"], before["bf16 split"])
    MATMUL.allow_fp16_reduced_precision_reduction = (before["fp16"], before["fp16 split"])
    torch.backends.cuda.enable_cudnn_sdp(before["cudnn attention"])
    torch.utils.deterministic.fill_uninitialized_memory = before["fill"]
    torch.set_deterministic_debug_mode(before["deterministic"])
    assert settings() == before


@pytest.mark.parametrize("devices", [CPU, CUDA], ids=["cpu", "cuda"])
@pytest.mark.parametrize("error", [None, KeyError], ids=["", "raises"])
def test_settings_inside_and_after(devices, error, caller):
    with contextlib.suppress(KeyError), exact(devices):
        inside = settings()
        if error:
            raise error
    assert settings() == caller
    assert inside["fp32"] == "ieee"
    assert not inside["bf16"]
    assert not inside["fp16"]
    assert (inside["bf16 split"], inside["fp16 split"]) == (caller["bf16 split"], caller["fp16 split"])
    # Products of cuBLAS must not meet a deterministic mode that the caller has not asked for.
    assert inside["deterministic"] == caller["deterministic"]
    if devices is CUDA:
        assert not inside["cudnn attention"]
        assert not inside["fill"]
    else:
        assert inside["cudnn attention"] == caller["cudnn attention"]


class ScaledDotProductSpy(torch.autograd.Function):
    """Named as the fused attentions are; its backward tells the mode that it runs under."""

    @staticmethod
    def forward(ctx, x, seen):
        ctx.seen = seen
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.seen.append(torch.get_deterministic_debug_mode())
        return gradient, None


class Product(ScaledDotProductSpy):
    pass


@pytest.fixture
def untouched() -> Iterator[None]:
    """Settings of fp32 products as torch starts, before and after."""
    assert (torch.backends.fp32_precision, MATMUL.fp32_precision) == ("none", "none")
    yield
    torch.backends.fp32_precision = MATMUL.fp32_precision = "none"


@pytest.mark.parametrize("common", ["none", "ieee", "tf32"])
@pytest.mark.parametrize("own", ["none", "ieee", "tf32"])
def test_a_setting_that_products_inherit_stays_inherited(own, common, untouched):
    torch.backends.fp32_precision, MATMUL.fp32_precision = common, own
    with exact(CPU):
        assert MATMUL.fp32_precision == "ieee"
    assert torch.backends.fp32_precision == common
    for later in ("ieee", "tf32"):
        torch.backends.fp32_precision = later
        assert MATMUL.fp32_precision == (later if own == "none" else own)


@pytest.mark.parametrize("cut", [False, True])
def test_attention_alone_runs_backward_in_deterministic_mode(cut):
    """Also where what it computes was cut to the size of the heads."""
    x, attention, before, after = torch.ones(3, requires_grad=True), [], [], []
    y = ScaledDotProductSpy.apply(Product.apply(x, after), attention)
    y = y[..., :2] if cut else y
    launched_deterministically(y.grad_fn)
    Product.apply(y, before).sum().backward()
    assert (before, attention, after) == ([0], [2], [0])
    assert torch.get_deterministic_debug_mode() == 0


def test_a_node_of_another_kind_is_left_alone():
    x, seen = torch.ones(3, requires_grad=True), []
    y = Product.apply(x, seen)
    launched_deterministically(y.grad_fn)
    launched_deterministically(x.grad_fn)
    y.sum().backward()
    assert seen == [0]


def test_the_attention_that_torch_computes_is_found():
    """Its node has the name that is looked for, also where a layer is recomputed, and gradients stay what they are."""
    drawn = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    gradients, modes = [], []
    for way in (contextlib.nullcontext, _repeatable_attention):
        q = drawn.clone().requires_grad_()
        with way():
            y = F.scaled_dot_product_attention(q, q, q, is_causal=True)
            y.grad_fn.register_prehook(lambda gradient: modes.append(torch.get_deterministic_debug_mode()))
            y.square().sum().backward()
        gradients.append(q.grad)
    assert torch.equal(*gradients)
    assert modes == [0, 2], "hooks run in the order in which they came"
    assert torch.get_deterministic_debug_mode() == 0


def test_the_mode_does_not_outlive_a_backward_pass_that_breaks_off():
    class ScaledDotProductFails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise KeyError

    y = ScaledDotProductFails.apply(torch.ones(3, requires_grad=True))
    launched_deterministically(y.grad_fn)
    with pytest.raises(KeyError), _repeatable_attention():
        y.backward(torch.ones(3))
    assert torch.get_deterministic_debug_mode() == 0


@pytest.mark.parametrize("checkpointed", [True, False])
def test_a_walk_with_repeatable_attention_gives_the_same_scores(checkpointed, monkeypatch):
    """Recomputed or not, the backward of each layer's attention is found once, and nothing else."""
    model, tokens, found = build("llama"), draw_tokens(), []
    expected = score(model, tokens, gradient_checkpointing=checkpointed)

    def counted(node):
        launched_deterministically(node)
        node.register_prehook(lambda gradient: found.append(torch.get_deterministic_debug_mode()))

    monkeypatch.setattr("nirvana.ops.precision.launched_deterministically", counted)
    with _repeatable_attention():
        ours = score(model, tokens, gradient_checkpointing=checkpointed)
    assert all(torch.equal(ours[block], values) for block, values in expected.items())
    assert found == [2] * model.config.num_hidden_layers
    assert torch.get_deterministic_debug_mode() == 0
