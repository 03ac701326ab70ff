"""Settings of torch that decide what sums of products are, and whether attention gives the same bits twice."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

#: By default torch lets cuBLAS add partial sums of bf16 and fp16 products in that type.
_REDUCTIONS = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")


@contextlib.contextmanager
def exact(devices: Collection[torch.device]) -> Iterator[None]:
    """Inside, products have fp32 sums and fp32 products are no TF32, whatever the caller has set; and what runs on one
    of `devices` gives the same bits on every run. Afterwards all settings are what they were.

    They are the process's: threads of the caller that use a GPU meanwhile get them, too.
    """
    matmul = torch.backends.cuda.matmul
    with contextlib.ExitStack() as stack:
        # The setting of torch 2.9 and later: one that was made with it cannot be read as `allow_tf32`.
        if hasattr(matmul, "fp32_precision"):
            own = "none" if _inherited() else matmul.fp32_precision
            stack.enter_context(_set(matmul, "fp32_precision", "ieee", own))
        else:
            stack.enter_context(_set(matmul, "allow_tf32", False))
        for name in _REDUCTIONS:
            # One value holds this and whether cuBLAS may split sums at all.
            split = getattr(matmul, f"{name}_split_k", None)
            own = getattr(matmul, name)
            stack.enter_context(
                _set(matmul, name, False) if split is None else _set(matmul, name, (False, split), (own, split))
            )
        if any(device.type == "cuda" for device in devices):
            stack.enter_context(_repeatable_attention())
        yield


def _inherited() -> bool:
    """Whether fp32 products follow `torch.backends.fp32_precision`. To read their own setting does not tell: it is then
    that one, and to write it back would make it their own, which the caller's next change would not reach."""
    matmul, common = torch.backends.cuda.matmul, torch.backends.fp32_precision
    found = matmul.fp32_precision
    try:
        torch.backends.fp32_precision = "tf32" if found == "ieee" else "ieee"
        return matmul.fp32_precision != found
    finally:
        torch.backends.fp32_precision = common


@contextlib.contextmanager
def _set(owner: Any, name: str, value: Any, before: Any = None) -> Iterator[None]:
    before = getattr(owner, name) if before is None else before
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def _repeatable_attention() -> Iterator[None]:
    """Inside, backward passes of the attention that is computed give the same bits on every run.

    Flash and memory-efficient attention add to the gradient of the queries by atomics, one block of keys after another:
    from three blocks on (of 64 or 128 keys) the order shows. Both have a deterministic form that they take under
    `torch.use_deterministic_algorithms(True)` alone: with ``warn_only`` they warn and stay as they are. But that makes
    every product of cuBLAS an error unless the environment had CUBLAS_WORKSPACE_CONFIG before the first one. So the
    setting is on while a backward of attention is launched, and at no other time. cuDNN's attention has no such form.
    """
    mode, cudnn = torch.get_deterministic_debug_mode(), torch.backends.cuda.cudnn_sdp_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a matter of debugging, and a write of every tensor
    try:
        with _Attention():
            yield
    finally:
        torch.set_deterministic_debug_mode(mode)  # also when a backward pass broke off in between
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        torch.utils.deterministic.fill_uninitialized_memory = fills


class _Attention(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            launched_deterministically(result.grad_fn)
        return result


def launched_deterministically(node: torch.autograd.graph.Node | None) -> None:
    """Have the backward of a fused attention run under `torch.use_deterministic_algorithms(True)`, and nothing else.

    Attention that is put together of products and a softmax has another kind of node, and is deterministic as it is.
    """
    if node is not None and node.name().startswith("Slice"):
        node = node.next_functions[0][0]  # flash attention pads heads to a multiple of 8, and cuts the result
    if node is None or not node.name().startswith("ScaledDotProduct"):
        return
    before: list[int] = []

    def on(gradients: tuple) -> None:
        before.append(torch.get_deterministic_debug_mode())
        torch.set_deterministic_debug_mode("error")

    def off(inputs: tuple, gradients: tuple) -> None:
        torch.set_deterministic_debug_mode(before.pop())

    node.register_prehook(on)
    node.register_hook(off)
