"""The whole way: text -> calibration batch -> saliency -> plan -> slice -> checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nirvana.architectures import describe
from nirvana.calibration import CalibrationBatch, draw_batches
from nirvana.checkpoint.atomic import check_target
from nirvana.checkpoint.save import save_checkpoint
from nirvana.checkpoint.tensors import ModelTensors
from nirvana.deciding import decide
from nirvana.models import resolve
from nirvana.plan import PruningPlan
from nirvana.progress import Progress
from nirvana.recipe import AUTO, Recipe
from nirvana.repair import RIDGE
from nirvana.repair.weights import OutputWeights
from nirvana.retention import kept_saliency_line
from nirvana.saliency import Saliency
from nirvana.selection import check_criterion, check_search, draw_candidates
from nirvana.slicing import SlicedTensors, apply
from nirvana.widths import WidthRule


@dataclass(frozen=True)
class PruneResult:
    """What `prune` made.

    Attributes:
        saliency: scores of all units; with several steps, those of the last.
        plan: which units stay.
        checkpoint: the folder that was written, or None.
        model: the smaller model in memory, where no folder was asked for.
        ntk: what the plan keeps of the neural tangent kernel (`nirvana.saliency.ntk`), where it was asked for.
    """

    saliency: Saliency = field(repr=False)
    plan: PruningPlan
    checkpoint: Path | None
    model: PreTrainedModel | None = field(repr=False)
    ntk: dict[str, Any] | None = field(default=None, repr=False)


def prune(
    model: str | Path | PreTrainedModel,
    sparsity: float,
    *,
    out: str | Path | None = None,
    calibration: str | Path = "novels",
    num_examples: int = 32,
    seq_len: int = 128,
    packing: str = "random",
    seed: int = 0,
    batches: int = 1,
    combine: str = "mean",
    candidates: int = 1,
    probe: str | Path | None = None,
    probe_examples: int | None = None,
    criterion: str = "nirvana",
    objective: str | None = None,
    gamma: float | str | Mapping[str, float] = 3.36,
    rounding: str = "budget",
    align: int = 8,
    scope: str = "both",
    allocation: str = "global",
    max_widths: int | None = None,
    tensor_parallel: int = 1,
    steps: int = 1,
    repair: str | None = None,
    repair_ridge: float = RIDGE,
    repair_strength: float | str = 1.0,
    ntk: bool = False,
    micro_batch: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> PruneResult:
    """Prune a model.

    Args:
        model: Hub id, checkpoint folder, .gguf file, "demo", or a model in memory (which is left untouched).
        sparsity: fraction of the prunable parameters (attention + MLP matrices) to remove.
        out: folder for the smaller checkpoint. Without it the smaller model stays in memory (`result.model`).
        calibration: corpus name, hub:OWNER/NAME:SPLIT:FIELD, .txt, .jsonl, .parquet, folder, or .npy of token ids;
            a+b is a mixture; a,b gives candidates from both.
        num_examples, seq_len, packing, seed: size of each calibration batch and how it is drawn.
        batches, combine: score so many batches and combine the scores: "mean", "median" (of ranks) or "rank-mean".
        candidates: score so many batches and take the one whose pruned model stays closest to the dense one.
        probe, probe_examples: held-out text on which candidates, gamma and the strength of a repair are chosen; by
            default other examples of `calibration`, as many as in a batch.
        criterion, objective, micro_batch: see `nirvana.score`.
        gamma, rounding, align, scope, allocation, max_widths, tensor_parallel: see `nirvana.allocate`; gamma "auto" is
            searched on the probe.
        steps: reach the sparsity in so many equal steps, each scored on the model that the one before left.
        repair: "least-squares" refits the output layers so that kept units take over what they can of removed ones,
            "bias" only their biases, "none" leaves the kept weights as they are (`nirvana.repair.repair`). None is
            least-squares for criteria that read calibration data, else none.
        repair_ridge, repair_strength: ridge of the least squares, relative; fraction of the repair that is kept, or
            "auto": chosen on the probe.
        ntk: report what the plan keeps of the neural tangent kernel: two more backward passes, on the probe.
        dtype: type in which the model is scored and written; "auto" is the stored one.
        device: where it is scored; "auto" takes CUDA where there is one.
        tokenizer: for a model in memory; otherwise the checkpoint's own.
        overwrite: replace an older checkpoint at `out`.
        trust_remote_code: let transformers run code that comes with the checkpoint.
        progress: told how far the work is; silent by default.

    Raises:
        NirvanaError: bad input; nothing is written.
    """
    progress = progress or Progress()
    if out is not None:
        check_target(out, overwrite, directory=True)
    first_gamma = WidthRule.gamma if gamma == AUTO else gamma
    rule = WidthRule(sparsity, first_gamma, rounding, align, scope, allocation, max_widths, tensor_parallel)
    recipe = Recipe(
        criterion=criterion,
        objective=objective,
        micro_batch=micro_batch,
        seed=seed,
        batches=batches,
        combine=combine,
        candidates=candidates,
        search_gamma=gamma == AUTO,
        steps=steps,
        repair=repair,
        repair_ridge=repair_ridge,
        repair_strength=repair_strength,
        ntk=ntk,
    )
    if recipe.search_gamma:
        check_search(rule)
    if recipe.candidates > 1:
        check_criterion(recipe.criterion)
    generation_config = None
    borrowed = isinstance(model, PreTrainedModel)
    if borrowed:
        generation_config = model.generation_config
    else:
        source = resolve(model, trust_remote_code)
        source.config()
        if out is not None:
            source.refuse_as_target(out)
        tokenizer = source.tokenizer()
        generation_config = source.generation_config()
        model = source.model(dtype, device)
    sizes = {"num_examples": num_examples, "seq_len": seq_len, "seed": seed, "packing": packing}
    drawn, held_out = draw(calibration, tokenizer, recipe, probe, probe_examples, **sizes)
    architecture = describe(model)
    own = OutputWeights(model, architecture) if borrowed and recipe.changes_weights else None
    try:
        decision = decide(model, drawn, held_out, rule, recipe, progress, dense=own)
        plan = decision.plan
        if line := kept_saliency_line(plan.settings):
            progress.note(line)
        if out is None:
            return PruneResult(decision.saliency, plan, None, apply(model, plan), decision.ntk)
        folder = save_checkpoint(
            out,
            SlicedTensors(ModelTensors(model), architecture, plan),
            plan,
            tokenizer=tokenizer,
            generation_config=generation_config,
            overwrite=overwrite,
            progress=progress,
        )
    finally:
        if own is not None:
            own.restore()
    return PruneResult(decision.saliency, plan, folder, None, decision.ntk)


def draw(
    calibration: str | Path,
    tokenizer: PreTrainedTokenizerBase | None,
    recipe: Recipe,
    probe: str | Path | None = None,
    probe_examples: int | None = None,
    **options: Any,
) -> tuple[list[CalibrationBatch], Tensor | None]:
    """The batches that a recipe reads, and the probe's tokens where it needs a probe; none overlap.

    Args:
        options: ``num_examples, seq_len, seed, packing``: see `nirvana.calibration.draw_batches`.
    """
    if not recipe.needs_tokens:
        return [], None
    count = max(recipe.batches, recipe.candidates)
    if not recipe.needs_probe and count == 1:
        return draw_batches(calibration, tokenizer, **options), None
    drawn = draw_candidates(calibration, tokenizer, count=count, probe=probe, probe_examples=probe_examples, **options)
    return list(drawn.batches), drawn.probe.tokens if recipe.needs_probe else None
