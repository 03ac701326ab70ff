"""The whole way: text -> calibration batch -> saliency -> plan -> slice -> checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nirvana.allocation import allocate
from nirvana.architectures import describe
from nirvana.calibration import load_batch
from nirvana.checkpoint.atomic import check_target
from nirvana.checkpoint.save import save_checkpoint
from nirvana.checkpoint.tensors import ModelTensors
from nirvana.models import resolve
from nirvana.plan import PruningPlan
from nirvana.progress import Progress
from nirvana.retention import kept_saliency_line
from nirvana.saliency import Saliency, needs_calibration, score
from nirvana.slicing import SlicedTensors, apply
from nirvana.widths import WidthRule


@dataclass(frozen=True)
class PruneResult:
    """What `prune` made.

    Attributes:
        saliency: scores of all units.
        plan: which units stay.
        checkpoint: the folder that was written, or None.
        model: the smaller model in memory, where no folder was asked for.
    """

    saliency: Saliency = field(repr=False)
    plan: PruningPlan
    checkpoint: Path | None
    model: PreTrainedModel | None = field(repr=False)


def prune(
    model: str | Path | PreTrainedModel,
    sparsity: float,
    *,
    out: str | Path | None = None,
    calibration: str | Path = "novels",
    num_examples: int = 32,
    seq_len: int = 128,
    seed: int = 0,
    criterion: str = "nirvana",
    objective: str = "max-logit",
    gamma: float = 3.36,
    rounding: str = "budget",
    align: int = 8,
    scope: str = "both",
    allocation: str = "global",
    max_widths: int | None = None,
    tensor_parallel: int = 1,
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
        calibration: corpus name, .txt, .jsonl, .parquet, folder of .txt, or .npy of token ids.
        num_examples, seq_len, seed: size of the calibration batch and seed of its draw.
        criterion, objective, micro_batch: see `nirvana.score`.
        gamma, rounding, align, scope, allocation, max_widths, tensor_parallel: see `nirvana.allocate`.
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
    rule = WidthRule(sparsity, gamma, rounding, align, scope, allocation, max_widths, tensor_parallel)
    generation_config = None
    if isinstance(model, PreTrainedModel):
        generation_config = model.generation_config
    else:
        source = resolve(model, trust_remote_code)
        source.config()
        if out is not None:
            source.refuse_as_target(out)
        tokenizer = source.tokenizer()
        generation_config = source.generation_config()
        model = source.model(dtype, device)
    tokens = None
    if needs_calibration(criterion):
        tokens = load_batch(calibration, tokenizer, num_examples=num_examples, seq_len=seq_len, seed=seed)
    architecture = describe(model)
    with progress.stage("score", sum(s.scored for b in architecture.blocks for s in b.slices)) as advance:
        saliency = score(
            model,
            tokens,
            criterion=criterion,
            objective=objective,
            micro_batch=micro_batch,
            seed=seed,
            progress=lambda: advance(1),
        )
    if tokens is not None:
        saliency.settings |= {"calibration": str(calibration), "seed": seed}
    plan = allocate(saliency, model, **asdict(rule))
    if line := kept_saliency_line(plan.settings):
        progress.note(line)
    if out is None:
        return PruneResult(saliency, plan, None, apply(model, plan))
    folder = save_checkpoint(
        out,
        SlicedTensors(ModelTensors(model), architecture, plan),
        plan,
        tokenizer=tokenizer,
        generation_config=generation_config,
        overwrite=overwrite,
        progress=progress,
    )
    return PruneResult(saliency, plan, folder, None)
