"""transformers decoder -> ONNX graph, by torch.export."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

BATCH, NEW, PAST, TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
#: Sizes that differ from each other and from 0 and 1, which torch.export would take for constants.
EXAMPLES, NEW_TOKENS, PAST_TOKENS = 2, 4, 3

Past = list[tuple[Tensor, Tensor]]


class _WithCache(nn.Module):
    """Tensors in, tensors out. Layers with a sliding window keep the whole past too; their mask hides the rest."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Past
    ) -> tuple[Tensor, Past]:
        cache = DynamicCache(past)
        logits = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        ).logits
        return logits, [(layer.keys, layer.values) for layer in cache.layers]


class _WithoutCache(nn.Module):
    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
        ).logits


def trace(model: PreTrainedModel, cache: bool) -> ir.Model:
    """The graph with its weights, which are those of `model` and not copied."""
    past = _example_past(model) if cache else []
    length = PAST_TOKENS if cache else 0
    tokens = torch.ones(EXAMPLES, NEW_TOKENS, dtype=torch.int64)
    mask = torch.ones(EXAMPLES, length + NEW_TOKENS, dtype=torch.int64)
    positions = torch.arange(length, length + NEW_TOKENS).expand(EXAMPLES, -1)
    new, total = {0: BATCH, 1: NEW}, {0: BATCH, 1: TOTAL if cache else NEW}
    shapes: tuple = (new, total, new)
    inputs: tuple = (tokens, mask, positions)
    if cache:
        inputs += (past,)
        shapes += ([({0: BATCH, 2: PAST}, {0: BATCH, 2: PAST}) for _ in past],)
    each = [f"{layer}.{part}" for layer in range(len(past)) for part in ("key", "value")]
    with _silence(), torch.no_grad():
        program = torch.onnx.export(
            (_WithCache if cache else _WithoutCache)(model).eval(),
            inputs,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{name}" for name in each)],
            output_names=["logits", *(f"present.{name}" for name in each)],
            # Rewriting takes three quarters of the time (135 s of 180 s with 30 layers) and gains nothing: ONNX Runtime
            # does the same when it opens the file (33 and 37 ms per token; 2.87 and 2.90 in a prompt).
            optimize=False,
            verbose=False,
        )
    _add_choice_of_logits(program.model.graph)
    _forget_origins(program.model)
    return program.model


@torch.no_grad()
def _example_past(model: PreTrainedModel) -> Past:
    """Made by the model itself, so that each layer has its own heads."""
    cache = DynamicCache()
    model(input_ids=torch.ones(EXAMPLES, PAST_TOKENS, dtype=torch.int64), past_key_values=cache)
    return [(layer.keys, layer.values) for layer in cache.layers]


def _add_choice_of_logits(graph: ir.Graph) -> None:
    """The optional input `num_logits_to_keep`. The vocabulary head is the largest matrix of a small model, and a prompt
    needs it for its last token only. torch.export cannot trace a length that stands in a tensor."""
    logits = graph.outputs[0]
    head = logits.producer()
    if head is None or head.op_type != "MatMul":
        raise ValueError(f"the logits come from {head}, not from the product with the vocabulary head")
    # An initializer that is also an input is an input with a default.
    count = ir.val("num_logits_to_keep", ir.DataType.INT64, (), const_value=ir.tensor(np.array(0)))
    graph.inputs.append(count)
    graph.register_initializer(count)
    constants = {}
    for name, value in (("first", 0), ("tokens", 1), ("end", np.iinfo(np.int64).max)):
        constants[name] = ir.val(f"logits.{name}", const_value=ir.tensor(np.array([value]), name=f"logits.{name}"))
        graph.register_initializer(constants[name])
    start = ir.node("Unsqueeze", [count, constants["first"]])
    back = ir.node("Neg", start.outputs)  # 0 stays 0: everything
    last = ir.node("Slice", [head.inputs[0], *back.outputs, constants["end"], constants["tokens"]])
    graph.insert_before(head, [start, back, last])
    head.replace_input_with(0, last.outputs[0])
    logits.shape = ir.Shape([BATCH, "num_logits", logits.shape[-1]])


def _forget_origins(model: ir.Model) -> None:
    """Each node carries the stack trace of its making, with the paths of this machine: 14 MB with 30 layers."""
    model.graph.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The exporter warns of torchvision and of names of dimensions; none of it is about what the user asked."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
