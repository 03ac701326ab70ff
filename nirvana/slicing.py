"""Plan + weights -> smaller weights, one tensor at a time; `apply` makes a model of them in memory."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from nirvana.architectures import Architecture, describe
from nirvana.checkpoint.tensors import ModelTensors, TensorInfo, TensorSource
from nirvana.errors import NirvanaError
from nirvana.ops import gather_slice
from nirvana.parameters import auto_class, check_tensors
from nirvana.plan import PruningPlan


@dataclass(frozen=True)
class Cut:
    """One tensor of the smaller model: the units `kept` of `source`."""

    source: str
    axis: int
    unit: int
    kept: tuple[int, ...]
    size: int
    block: str

    def shape(self, before: tuple[int, ...]) -> tuple[int, ...]:
        """Shape after the cut.

        Raises:
            NirvanaError: the tensor is not what the configuration promises; the message names block and tensor.
        """
        if len(before) <= self.axis or before[self.axis] != self.size * self.unit:
            raise NirvanaError(
                f"block {self.block}: {self.source} has shape {list(before)}, "
                f"axis {self.axis} must have length {self.size * self.unit}"
            )
        after = list(before)
        after[self.axis] = len(self.kept) * self.unit
        return tuple(after)

    def of(self, tensor: Tensor) -> Tensor:
        """The kept units of `tensor`, which is the whole `source`; raises as `shape` does."""
        self.shape(tuple(tensor.shape))
        return gather_slice(tensor, self.kept, axis=self.axis, unit=self.unit)


class SlicedTensors:
    """The tensors of the smaller model, cut from `source` one at a time as they are asked for.

    Args:
        source: the weights of the model that the plan was made for.
        architecture: that model's description.
        plan: a plan that fits it.
        dtype: type of the floating-point results; None keeps each tensor's own.
    """

    def __init__(
        self, source: TensorSource, architecture: Architecture, plan: PruningPlan, dtype: torch.dtype | None = None
    ):
        plan.check_fits(architecture)
        self.config = architecture.pruned_config(plan.kept)
        self._source, self._dtype = source, dtype
        self._cuts = cuts(architecture, plan, self.config)
        replaced = {cut.source for cut in self._cuts.values()}
        before = source.info()
        for cut in self._cuts.values():
            if cut.source not in before:
                raise NirvanaError(f"block {cut.block}: the checkpoint has no tensor {cut.source}")
        self._info: dict[str, TensorInfo] = {}
        for name, info in before.items():
            if name not in replaced:
                self._info[name] = TensorInfo(info.shape, self._target_dtype(info.dtype))
        for name, cut in self._cuts.items():
            info = before[cut.source]
            self._info[name] = TensorInfo(cut.shape(info.shape), self._target_dtype(info.dtype))
        # Sorted, so that the same weights give the same bytes whether they come from a model or from files; wide types
        # first, so that in a file of mixed types every tensor starts at a multiple of its element size.
        self._info = dict(sorted(self._info.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
        check_tensors(self._info, self.config)

    def _target_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self._dtype if self._dtype is not None and dtype.is_floating_point else dtype

    def info(self) -> dict[str, TensorInfo]:
        return self._info

    @property
    def dtype(self) -> torch.dtype:
        """The type of most of the weights, as the configuration names it."""
        sizes: dict[torch.dtype, int] = {}
        for info in self._info.values():
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
        return max(sizes, key=sizes.__getitem__)

    def is_cut(self, name: str) -> bool:
        """Whether the tensor loses units; the others are handed on as they are."""
        return name in self._cuts

    def load(self, name: str) -> Tensor:
        cut = self._cuts.get(name)
        tensor = self._source.load(name) if cut is None else cut.of(self._source.load(cut.source))
        return tensor.to(self._info[name].dtype)


def cuts(architecture: Architecture, plan: PruningPlan, config: PreTrainedConfig) -> dict[str, Cut]:
    """Tensor name -> cut, for every tensor that is not copied whole.

    Args:
        architecture: of the model before or after pruning: names and the channels of a unit are the same.
        config: of the smaller model.
    """
    unequal = config.model_type.startswith("pruned_")
    blocks = {block.name: block for block in plan.blocks}
    found = {}
    for block in architecture.blocks:
        planned = blocks[block.name]
        for part in block.slices:
            # Tensors that a stock model does not have (T5's position bias beyond the first layer) exist only in the
            # classes for unequal widths.
            if part.source_tensor == part.tensor or unequal:
                found[part.tensor] = Cut(
                    part.source_tensor, part.axis, part.unit, planned.kept, planned.size, block.name
                )
    return found


def apply(
    model: PreTrainedModel, plan: PruningPlan, *, progress: Callable[[int], None] = lambda count: None
) -> PreTrainedModel:
    """The smaller model in memory. The input model is untouched and shares no memory with the result.

    Args:
        model: a supported model with its language-model head, in any floating-point type on any device.
        plan: made for this model, or for one of the same shape.
        progress: called with 1 after each tensor.

    Returns:
        A model in evaluation mode: of the stock class where all layers are equally wide, else of a subclass that
        builds each layer from the configuration's per-layer widths. It generates, trains and saves like any other.

    Raises:
        NirvanaError: the plan does not fit the model; the message names the block.
    """
    architecture = describe(model)
    if type(model).__name__.removeprefix("Pruned") != architecture.family.model_class:
        raise NirvanaError(
            f"cannot slice a {type(model).__name__}; load the model as {architecture.family.model_class} "
            "(merge adapters first)"
        )
    sliced = SlicedTensors(ModelTensors(model), architecture, plan)
    small = assemble(sliced, model.dtype, model.device, progress)
    small.generation_config = copy.deepcopy(model.generation_config)
    return small


def assemble(
    sliced: SlicedTensors,
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int], None] = lambda count: None,
) -> PreTrainedModel:
    """A model of these tensors, which go to `device` one at a time; it shares no memory with their source.

    Args:
        dtype: of the parameters.
        progress: called with 1 after each tensor.
    """
    model_class = auto_class(sliced.config)._model_mapping[type(sliced.config)]
    state = {}
    # Outside of any inference mode of the caller: the result can be trained.
    with torch.inference_mode(False), _transformers_silent():
        for name in sliced.info():
            # A tensor that no plan touches is still the source's own. No local name keeps it while the next is read.
            state[name] = sliced.load(name).to(device, copy=not sliced.is_cut(name))
            progress(1)
        small = model_class.from_pretrained(None, config=sliced.config, state_dict=state, dtype=dtype)
    return small.to(device)


@contextlib.contextmanager
def _transformers_silent() -> Iterator[None]:
    """Inside, transformers draws no bar and says nothing of weights that come from memory."""
    bars, level = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
